"""Token Selective Attention (ToSA) for vision transformers, in JAX.

In every second layer of a ViT, attention and MLP run only on selected tokens; the others bypass the layer and rejoin
after it. A small module, the token selector, chooses the tokens by predicting the layer's attention map. The number of
selected tokens is static, so that programs are compiled once, and every token keeps a feature after every layer.

A model by timm's name, with released weights
    import tosa_jax
    from flax import nnx

    model = tosa_jax.create_model("deit_small_patch16_224", keep_rate=0.5, rngs=nnx.Rngs(0))
    tosa_jax.load_pretrained(model, "deit_small_patch16_224-cd65a155.pth")
    out = model(images)             # float [b, 224, 224, 3], normalised
    out.logits                      # [b, classes]
    out.tokens                      # [b, tokens, width]: all tokens after the final norm, prefix first
    out.selected                    # a tuple of int32 [b, s]: the token indices of each selection

    Released weights contain no selectors. Without selectors, tokens are chosen by the attention map of the layer
    before. The stage `selector` of a run fits selectors on images without labels, and
    `load_pretrained(model, selectors=FILE)` loads them. `VARIANTS` has the names, `ViTConfig` the fields, `alternate`
    makes layer plans. `load_pretrained` reads the files of `save_weights` and `save_selectors`. With `task="depth"` the
    model has a decoder instead of a classification head (`DepthConfig`), and `out.depth` is [b, height, width] in
    metres.

Predictions of a trained model
    predictor = tosa_jax.Predictor.from_workdir("runs/digits", keep_rate=0.3)
    predictor.classify(["a.png", "b.png"])          # five `Guess`es an image: label, name, probability
    out = predictor(uint8_images)                   # a `Prediction`: logits, selected tokens and their scores

    predictor = tosa_jax.load("FOLDER or hf:owner/name", keep_rate=0.7)     # released weights that state what they are

    `Predictor.from_pretrained` loads released weights by name, `Predictor.from_weights` a file of `Predictor.save`.
    `Predictor.depth` is for depth models. `create_model(NAME, pretrained=True)` is the model alone.

    tosa_jax.export(predictor, "FOLDER")            # programs (StableHLO) and weights that run without this package

From the command line (each says more with --help)
    python -m tosa_jax.main --config=configs/digits.py         train: pretrain, selectors, fine-tune, evaluate
    python -m tosa_jax.prepare --config=configs/deit_s.py      prepare a data set, once
    python -m tosa_jax.predict --workdir=runs/digits IMAGE     classify images, show the selected tokens
    python -m tosa_jax.bench --model=deit_small_patch16_224    compare time and multiply-adds
    python -m tosa_jax.compile_check --config=configs/deit_s.py --topology=v5e:4x4      compile for a TPU without one

    A configuration is a Python file that starts from `tosa_jax.config.default_config()`; --config.FIELD=VALUE changes
    one of its fields. JAX uses the best device that it finds. With JAX_PLATFORMS=cuda, tpu or cpu it uses only devices
    of this kind, and it is an error if there are none.

Where to read on: `tosa_jax.ops` has token selection and attention as pure functions, `tosa_jax.ops.array_types` the
letters in array shapes, `tosa_jax.models.methods` one file a method.

Errors that a user can fix are `UserError`s. Their message is one line: what is wrong, where, and what to do.
"""

from etils import epy

# Importing the package costs next to nothing: each name brings its modules when it is first used.
with epy.lazy_api_imports(globals()):
    from tosa_jax.errors import UserError
    from tosa_jax.inference.export import export
    from tosa_jax.inference.predictor import Predictor, load
    from tosa_jax.models.factory import with_image_size
    from tosa_jax.models.variants import VARIANTS
    from tosa_jax.models.vit import Output, VisionTransformer
    from tosa_jax.models.vit_config import ViTConfig, alternate
    from tosa_jax.models.weights.load import load_pretrained, save_selectors, save_weights
    from tosa_jax.tasks.depth.config import DepthConfig
    from tosa_jax.tasks.predictions import Guess, Prediction
    from tosa_jax.tasks.registry import create_model

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
    "export",
    "load",
    "load_pretrained",
    "save_selectors",
    "save_weights",
    "with_image_size",
]
