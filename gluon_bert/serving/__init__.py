"""An exported network behind HTTP: what requests mean, what the model server calls, and the server itself."""
