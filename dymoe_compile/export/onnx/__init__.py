"""Export to ONNX, with the files of onnxruntime-genai beside the model."""
