"""Token Selective Attention (ToSA) for vision transformers, in JAX.

Every second layer of a ViT runs only on the tokens that a small selector expects the next layer to attend to; the
others bypass the layer and rejoin. Token counts are static, tokens are really gathered, and every token keeps a feature
at every depth.

A model, by timm's name, with released weights
    import tosa_jax
    from flax import nnx

    model = tosa_jax.create_model("deit_small_patch16_224", keep_rate=0.5, rngs=nnx.Rngs(0))
    tosa_jax.load_pretrained(model, "deit_small_patch16_224-cd65a155.pth")
    out = model(images)             # float [b, 224, 224, 3], normalised
    out.logits                      # [b, classes]
    out.tokens                      # [b, tokens, width] after the final norm, prefix first, all of them
    out.selected                    # a tuple of int32 [b, s]: the tokens that each selection chose

    Released weights know no selectors: until some are fitted (the stage `selector` of a run, which needs images and
    no labels), tokens are chosen by the map of the layer before. `load_pretrained(model, selectors=FILE)` adds them.
    `VARIANTS` has the names, `ViTConfig` every field, `alternate` makes layer plans. `save_weights` and
    `save_selectors` write what `load_pretrained` reads. With `task="depth"` a decoder takes the place of the head
    (`DepthConfig`), and `out.depth` is [b, height, width] in metres.

A trained network at work
    predictor = tosa_jax.Predictor.from_workdir("runs/digits", keep_rate=0.3)
    predictor.classify(["a.png", "b.png"])          # the five best `Guess`es of each: label, name, probability
    out = predictor(uint8_images)                   # a `Prediction`: logits, selected tokens and their scores

    `Predictor.from_pretrained` starts from a name and released weights, `Predictor.from_weights` from the one file
    that `Predictor.save` writes; `Predictor.depth` is for depth networks.

From the command line (each says more with --help)
    python -m tosa_jax.main --config=configs/digits.py         train: pretrain, selectors, fine-tune, evaluate
    python -m tosa_jax.prepare --config=configs/deit_s.py      make a data set ready, once
    python -m tosa_jax.predict --workdir=runs/digits IMAGE     classify, and show the selected tokens
    python -m tosa_jax.bench --model=deit_small_patch16_224    time beside multiply-adds
    python -m tosa_jax.compile_check --config=configs/deit_s.py --topology=v5e:4x4      will it fit, without a TPU

    A configuration is a Python file that starts from `tosa_jax.config.default_config()`; --config.FIELD=VALUE changes
    a field of it. JAX takes the best device it finds; JAX_PLATFORMS=cuda, tpu or cpu asks for one, and its lack is an
    error then.

To read on: `tosa_jax.ops` has the idea in pure functions, and `tosa_jax.ops.array_types` what letters in shapes
mean; `tosa_jax.models.methods` has a file for each method, `tosa_jax.models.token_state` says what it must have.

What a person can mend raises a `UserError` of one line: what is wrong, where, and what to do.
"""

from etils import epy

# Importing the package costs next to nothing: each name brings its modules when it is first used.
with epy.lazy_api_imports(globals()):
    from tosa_jax.errors import UserError
    from tosa_jax.inference.predictions import Guess, Prediction
    from tosa_jax.inference.predictor import Predictor
    from tosa_jax.models.depth import DepthConfig
    from tosa_jax.models.factory import create_model
    from tosa_jax.models.vit import Output, VisionTransformer
    from tosa_jax.models.vit_config import VARIANTS, ViTConfig, alternate
    from tosa_jax.models.weights.load import load_pretrained, save_selectors, save_weights

__all__ = [
    "VARIANTS",
    "DepthConfig",
    "Guess",
    "Output",
    "Prediction",
    "Predictor",
    "UserError",
    "ViTConfig",
    "VisionTransformer",
    "alternate",
    "create_model",
    "load_pretrained",
    "save_selectors",
    "save_weights",
]
