"""Tasks of lmms-eval: a YAML file each; what those files name is in the modules beside them."""
