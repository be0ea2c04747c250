"""Tools around a model: description, evaluation, speed probe, trace analysis and charts."""
