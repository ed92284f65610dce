"""What lmms-eval's entry point group `lmms_eval.models` loads."""


def manifest():
    """Describes our model to lmms-eval's registry."""
    # The registry calls this while it is being imported: an import above would go round in a circle.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("etchat", simple_class_path=f"{__name__}.etchat.ETChat")
