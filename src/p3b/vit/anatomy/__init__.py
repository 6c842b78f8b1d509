"""What a block consists of, part by part: for each part its weights, its gates, its exact cut.

    weights     names for the axes of a weight; everything else follows from them
    norms       layer norms: their moments, over all channels or over those that stay
    body        what an attention or an MLP has to say of itself (`Body`)
    attention   timm's Attention                             mlp    timm's Mlp
    half        where a body stands in a block: `PreNorm`, x + scale(body(norm(x)))

A family (`p3b.vit.families`) puts parts together. docs/families.md shows how one is added.
"""
