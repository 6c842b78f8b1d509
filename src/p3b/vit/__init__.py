"""The only room that knows the anatomy of a timm VisionTransformer."""
