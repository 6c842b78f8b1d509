"""The demo: a pretrained network small enough to travel with the package, and the domain that it was trained on."""
