"""The networks, one file per architecture. Training, serving and quantized execution all run these modules."""
