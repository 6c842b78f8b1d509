"""`p3b push`: a saved model on the Hugging Face hub."""

from __future__ import annotations

from p3b.deploy.hub import push
from p3b.run.deploy_options import PushConfig
from p3b.run.screen import Screen


def push_saved(config: PushConfig) -> None:
    """Push the model, and say where it is.

    Raises:
        UserError: the model cannot be used, or the hub does not take it.
    """
    private = True if config.private else None
    address = push(config.model, config.repo, revision=config.revision, private=private, message=config.message)
    screen = Screen(is_main=True)
    screen.say(f"pushed to {address}")
    screen.say(f'p3b.load("{config.repo}"), or after import p3b timm.create_model("hf-hub:{config.repo}", pretrained=True)')
