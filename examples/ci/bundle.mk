# Compile, gate, sign and publish a bundle: make -f bundle.mk MODEL=path/to/checkpoint
# It needs pip install 'dymoe[compile,sign]', and 'dymoe[onnx]' for EXPORT=onnx. In a clone of DyMoE, `make pipeline`
# installs that and runs this file with the values below.

MODEL ?= examples/model
NAME ?= model
PROFILE ?= laptop-8gb
# What the bundle must be. `make` fails where it is worse, larger or slower.
MAX_KL ?= 0.05
MAX_BYTES ?= 20MiB
MIN_TOKENS_PER_S ?= 5
# Texts to calibrate with instead of the shipped mix, and what to export besides the bundle: onnx, or nothing.
CALIBRATION ?=
EXPORT ?=
# Where the work is, and where what is published goes.
OUT ?= build/pipeline
PUBLISH ?= $(OUT)/published
# The private key. Without one, a key is made to try the pipeline with; the devices know the public half of yours.
KEY ?= $(OUT)/key.pem
# Prefix of our programs, such as .venv/bin/
BIN ?=

BUNDLE := $(OUT)/$(NAME).dymoe
DIST := $(OUT)/dist
PACKED := $(DIST)/$(NAME).dymoe
PUBLIC := $(OUT)/key.pub

.PHONY: publish compile check pack sign export
.NOTPARALLEL:

publish: sign $(if $(EXPORT),export)
	mkdir -p $(PUBLISH)
	cp -R $(DIST)/. $(PUBLISH)
	$(BIN)dymoe-bundle verify $(PUBLISH)/$(NAME).dymoe --key $(PUBLIC)

compile:
	mkdir -p $(OUT)
	$(BIN)dymoe-compile $(MODEL) -o $(BUNDLE) --profile $(PROFILE) --progress json \
	    $(if $(CALIBRATION),--calibration $(CALIBRATION))

# A gate that fails leaves check.json and check.xml, and the report in the bundle.
check: compile
	$(BIN)dymoe-bundle check $(BUNDLE) --profile $(PROFILE) --max-kl $(MAX_KL) --max-bytes $(MAX_BYTES) \
	    --min-tokens-per-s $(MIN_TOKENS_PER_S) --junit $(OUT)/check.xml --json > $(OUT)/check.json

pack: check
	rm -rf $(DIST)
	mkdir -p $(DIST)
	$(BIN)dymoe-bundle pack $(BUNDLE) -o $(PACKED)

sign: pack $(KEY)
	openssl pkey -in $(KEY) -pubout -out $(PUBLIC)
	$(BIN)dymoe-bundle sign $(PACKED) --key $(KEY)
	$(BIN)dymoe-bundle sbom $(PACKED) -o $(DIST)/$(NAME).cdx.json

export: pack
	$(BIN)dymoe-bundle export $(BUNDLE) -o $(DIST)/$(NAME)-$(EXPORT) --format $(EXPORT)

$(KEY):
	mkdir -p $(dir $(KEY))
	openssl genpkey -algorithm ed25519 -out $(KEY)
