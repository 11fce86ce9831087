"""Ulysses sequence parallelism, sinks included, for GptOssForCausalLM of the transformers package.

    torchrun --nproc_per_node 2 -m examples.transformers_ulysses

Copy `parallelize` and what is above it, with sp.py, model.py and what they import: fast.py,
flash.py, folders.py, mxfp4.py, recompute.py, shards.py, switch.py and weights.py. Transformers
hands every layer's attention to a function registered under a name. Ours trades tokens for heads,
runs the kernels of model.py over full sequences, the rank's sinks among them, and trades back.

Each rank calls the model with its slice of every sequence. Its logits are those of one rank's call
on full sequences, and the ranks' losses and gradients add up to the whole ones. Three things that
transformers would do wrong on a slice, without a word, are put right or refused: positions (it
counts every slice from 0), labels (it shifts them inside the slice) and padding.
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import sp
from model import choose_attention

choose = functools.lru_cache(choose_attention)  # layers share their block masks


def attention(module, q, k, v, mask, s_aux=None, sliding_window=None, position_ids=None, **_):
    """Transformers' attention function: q, k and v (B, heads, S/n, D) -> (B, S/n, H, D)."""
    if module.layer_idx == 0:  # once per forward: a GPU waits for the comparison
        sp.check_positions(position_ids)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    kind = q.device, q.dtype, q.shape[-1]
    attend = choose(q.shape[1] * sp.size(), sliding_window, None, *kind)
    return sp.ulysses(attend)(q, k, v, s_aux), None


def give_positions(module, args, kwargs):
    """Before the model's forward: the positions of this rank's slice."""
    mask = kwargs.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError("attention_mask has padding: pad on the right, and give no mask")
    if kwargs.get("position_ids") is None:
        inputs = *args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        x = next(x for x in inputs if x is not None)
        kwargs["position_ids"] = sp.positions(x.shape[1], x.device)[None]
    return args, kwargs


def check_labels(module, args, kwargs):
    """Before the whole model's forward: transformers would drop the last target of every slice."""
    if kwargs.get("labels") is not None:
        if kwargs.get("shift_labels") is None:
            raise ValueError(
                "labels would be shifted inside the slice: shift them before sp.shard, and give "
                "them as labels and as shift_labels"
            )
        kwargs["shift_labels"] = kwargs["shift_labels"].contiguous()  # it is viewed as one row
    return args, kwargs


def parallelize(model):
    """Make a GptOssForCausalLM take slices of sequences, after sp.init(mesh). Returns it."""
    from transformers import AttentionInterface

    AttentionInterface.register("ulysses", attention)
    model.set_attn_implementation("ulysses")
    model.model.register_forward_pre_hook(give_positions, with_kwargs=True)
    model.register_forward_pre_hook(check_labels, with_kwargs=True)
    return model


# --------------------------------------------------------------------------------------------------
# In use: one step of a small random model, and how far from one rank's it is


def main():
    from transformers import GptOssConfig, GptOssForCausalLM

    dist.init_process_group("gloo")
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": 16}
    torch.manual_seed(0)  # the same weights and tokens on every rank
    config = GptOssConfig(**sizes, **heads, num_hidden_layers=4, num_local_experts=8)
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config)
    text = torch.randint(512, (2, 129))
    tokens, targets = text[:, :-1], text[:, 1:].contiguous()  # (2, 128), shifted before they're cut
    count = torch.tensor(targets.numel())

    def step(tokens, targets):
        model.zero_grad()
        loss = model(tokens, labels=targets, shift_labels=targets, num_items_in_batch=count).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = step(tokens, targets)
    sp.init(init_device_mesh("cpu", (dist.get_world_size(),)))
    parallelize(model)
    found = step(*sp.shard(tokens, targets))
    for x in found:
        dist.all_reduce(x)  # the ranks' losses and gradients are parts of a sum
    errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, expected)]
    if dist.get_rank() == 0:
        print(f"loss {found[0]:.4f} on {sp.size()} ranks; from one rank's it differs by "
              f"{errors[0]:.1e}, the worst gradient by {max(errors[1:]):.1e}")  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
