import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the libraries' own warnings

torch = pytest.importorskip("torch")
hugging = pytest.importorskip("transformers")
nn, F = torch.nn, torch.nn.functional

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
ENCODER = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 16}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, **ENDS}
VISION = {**SIZES, "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "num_labels": 3}
GPT2 = {"vocab_size": 30, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, **ENDS}
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, **ENDS}
T5 |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
BART = {"vocab_size": 30, "d_model": 16, "max_position_embeddings": 16, "forced_eos_token_id": None, **ENDS}
BART |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}


def tokens(length=6):
    return torch.randint(1, 30, (3, length))


def padded():
    return {"input_ids": tokens(), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])}


def two_sided():
    return {"input_ids": tokens(), "decoder_input_ids": tokens(4)}


def from_library(config, model, inputs, options):
    return lambda: (getattr(hugging, model)(getattr(hugging, config)(**options)), inputs())


class UNet(nn.Module):
    """Down and up again: reflected and circular pads, instance norm, average pool, bilinear upsampling, a skip."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.last = nn.Conv2d(8, 2, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        wide = F.silu(self.norm(self.down(x)))
        return self.last(torch.cat([wide, self.up(F.avg_pool2d(wide, 2))], 1))


class Gated(nn.Module):
    """A GRU over what a transformer's encoder says."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cells = nn.GRU(8, 5, batch_first=True)

    def forward(self, x):
        return self.cells(self.encoder(x))[1][0]


FAMILIES = {
    "bert": from_library("BertConfig", "BertForSequenceClassification", padded, ENCODER),
    "gpt2": from_library("GPT2Config", "GPT2LMHeadModel", padded, GPT2),
    "bart": from_library("BartConfig", "BartForConditionalGeneration", two_sided, BART),
    "vit": from_library("ViTConfig", "ViTForImageClassification", lambda: torch.randn(3, 3, 16, 16), VISION),
    "unet": lambda: (UNet(), torch.randn(3, 2, 8, 8)),
    "gated": lambda: (Gated(), torch.randn(3, 4, 8)),
}
FLOAT32_INSIDE = {  # the library computes norms and angles in float32, whatever the module's dtype
    "llama": from_library("LlamaConfig", "LlamaForCausalLM", lambda: {"input_ids": tokens()}, GROUPED),
    "t5": from_library("T5Config", "T5ForConditionalGeneration", two_sided, T5),
}


@pytest.fixture
def float64(x64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [*FAMILIES, *FLOAT32_INSIDE])
def test_products_are_those_of_torch(float64, name):
    module, inputs = {**FAMILIES, **FLOAT32_INSIDE}[name]()
    targets = torch.zeros(3)
    model = hj.from_torch(module, (inputs, targets), lambda out, _: jnp.mean(jnp.sin(out + 1) * out))
    narrow = name in FLOAT32_INSIDE
    assert model.parity.dtype == ("float32" if narrow else "float64")
    tolerance = 1e-5 if narrow else 1e-10
    assert all(difference.relative < tolerance for difference in model.parity.differences)

    def in_torch(out, _):
        out = getattr(out, "logits", out)
        return (torch.sin(out + 1) * out).mean()

    vector = {name: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape) for name, leaf in model.params.items()}
    ours, theirs = model.hessian()(vector), hj.torch_operator(in_torch, module, [(inputs, targets)])(vector)
    scale = max(float(jnp.abs(leaf).max()) for leaf in theirs.values())
    for key, leaf in theirs.items():
        np.testing.assert_allclose(ours[key], leaf, rtol=0, atol=tolerance * scale, err_msg=key)


REFUSED = {
    "projected cells": (lambda: nn.LSTM(4, 5, proj_size=3, batch_first=True), r"proj_size"),
    "orthogonal weight": (
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 3)),
        r"`aten\.linalg_householder_product\.default` in layer `parametrizations\.weight\.0`",
    ),
    "spectrum": (lambda: Transform(), r"_fft_r2c"),
}


class Transform(nn.Module):
    """A filter in the frequency domain."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.gain, n=4)


@pytest.mark.parametrize("name", REFUSED)
def test_families_without_a_rule_are_refused_by_name(name):
    make, match = REFUSED[name]
    x = torch.randn(3, 2, 4)
    output = (lambda out: out[0]) if name == "projected cells" else None
    with pytest.raises(NotImplementedError, match=match):
        hj.from_torch(make(), (x, torch.zeros(3)), lambda out, _: jax.numpy.sum(out**2), output=output)
