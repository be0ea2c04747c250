"""The service that answers requests on a loaded model, whatever protocol they came by."""
