"""dymoe-run as a server: it answers clients of OpenAI's, Anthropic's and Ollama's protocols."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import click

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.cli.load import prepared, run_options
from dymoe_runtime.cli.run_flags import RunFlags
from dymoe_runtime.cli.sampling_flags import sampling, template_variables
from dymoe_runtime.engine.batch.load import load_batch
from dymoe_runtime.engine.batch.model import BatchModel
from dymoe_runtime.engine.load import DEFAULT_CONTEXT
from dymoe_runtime.engine.memory_plan import sequences_that_fit
from dymoe_runtime.errors import needing_extra
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.process import memory_limit
from dymoe_runtime.text.tokenizer import Tokenizer

with needing_extra("serve", "serving"):
    from dymoe_runtime.serving.http.answers.backend import About, Backend
    from dymoe_runtime.serving.http.answers.grammars import CompiledGrammars
    from dymoe_runtime.serving.http.answers.settings import Settings, read_keys
    from dymoe_runtime.serving.http.app import make_app
    from dymoe_runtime.serving.http.guard import is_local
    from dymoe_runtime.serving.http.server import bind
    from dymoe_runtime.serving.http.server import serve as serve_http
    from dymoe_runtime.serving.http.table import OPERATIONS
from dymoe_runtime.serving.service.batching.prompt_cache import PromptCache
from dymoe_runtime.serving.service.batching.service import BatchingService, Identity


def serve(bundle: Bundle, kernels: Kernels, flags: RunFlags) -> None:
    """Serve until SIGTERM or an interrupt; what runs then has the time of --grace.

    Raises DymoeError if the address cannot be had, the keys cannot be read, or the bundle cannot be loaded.
    """
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    settings = make_settings(tokenizer, flags)
    with (
        bind(flags.host, flags.port) as listener,
        load_parallel(bundle, kernels, flags) as model,
    ):
        identity = Identity.of(bundle.path, bundle.manifest.digest, model.budget.memory_bytes, flags.model_name)
        cache = None
        if flags.prompt_cache is not None:
            cache = PromptCache(flags.prompt_cache, flags.prompt_cache_size, model)
        service = BatchingService(model, tokenizer, identity, flags.queue, cache)
        backend = Backend(service, settings, describe(bundle, model.point), CompiledGrammars(tokenizer))
        port = listener.getsockname()[1]
        host = f"[{flags.host}]" if ":" in flags.host else flags.host

        def ready() -> None:
            click.echo(f"{identity.name} is served at http://{host}:{port}", err=True)

        if not settings.local:
            keyless = "" if settings.keys else ", and needs no key: give --api-key-file"
            click.echo(f"note: --host {flags.host}: whoever reaches this machine can use the server{keyless}", err=True)
        serve_http(make_app(backend, OPERATIONS), backend, listener, flags.grace, ready)
        model.remember()


def load_parallel(bundle: Bundle, kernels: Kernels, flags: RunFlags) -> BatchModel:
    """Load a bundle for the requests of --parallel; note on stderr what differs.

    Raises DymoeError as `load_batch` does.
    """
    options, spec = run_options(flags, min(DEFAULT_CONTEXT, bundle.spec.max_context)), bundle.spec
    memory, context = flags.memory or memory_limit(), options.context or spec.max_context
    sequences = flags.parallel or sequences_that_fit(bundle, kernels, context, options.kv_bits, memory)
    return prepared(load_batch(bundle, sequences, options, kernels), flags)


def make_settings(tokenizer: Tokenizer, flags: RunFlags) -> Settings:
    """Return what the flags say about requests; raise DymoeError for one that is not possible."""
    return Settings(
        params=sampling(tokenizer, flags),
        seed=flags.seed if flags.given("seed") else None,
        variables=template_variables(tokenizer, flags),
        stop=flags.stop,
        ignore_eos=flags.ignore_eos,
        max_tokens=flags.max_tokens,
        max_body_bytes=flags.max_body,
        time_limit_s=flags.time_limit,
        keys=() if flags.api_key_file is None else read_keys(flags.api_key_file),
        origins=flags.cors,
        local=is_local(flags.host),
    )


def describe(bundle: Bundle, point: str) -> About:
    """Return what lists of models say of a bundle that runs at an operating point."""
    spec = bundle.spec
    facts: dict[str, Any] = {
        "model_type": spec.model_type,
        "layers": spec.num_layers,
        "experts_per_layer": spec.num_experts,
        "experts_per_token": spec.top_k,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "max_context": spec.max_context,
        "tiers": list(bundle.manifest.ladder),
    }
    weights = spec.expert_weights
    return About(version("dymoe"), spec.model_type, bundle.total_bytes(), weights, point, facts=facts)
