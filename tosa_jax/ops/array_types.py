"""Array types, and the legend of their dimensions.

| letter    | meaning                                                              |
|-----------|----------------------------------------------------------------------|
| `b`       | batch (of this program, all devices)                                 |
| `n`       | tokens, prefix tokens included                                       |
| `d`       | width of a token                                                     |
| `h`       | heads; `dh` is the width of one                                      |
| `q` `k`   | query and key axis of an attention map                               |
| `s`       | selected tokens, prefix tokens included; `s <= n`                    |
| `c`       | classes, or channels of an image                                     |

`Float` is any floating dtype: which one is said by `dtype` (compute) and `param_dtype` (storage).
"""

from jaxtyping import Array, Bool, Float, Int32, UInt8

Images = Float[Array, "b height width c"]
RawImages = UInt8[Array, "b height width c"]
Tokens = Float[Array, "b n d"]
Heads = Float[Array, "b n h dh"]
Queries = Float[Array, "b q h dh"]
Keys = Float[Array, "b k h dh"]  # and values
AttnLogits = Float[Array, "b h q k"]
AttnMap = Float[Array, "b h q k"]
Scores = Float[Array, "b n"]
Indices = Int32[Array, "b s"]
Present = Bool[Array, "b n"]  # false for padding
Grids = Int32[Array, "b 2"]  # rows and columns of the patches of each image
PerExample = Float[Array, " b"]
