"""Estimates the device memory that an update of PI0 needs, without allocating it.

Weights, gradients and optimizer states are counted. Activations are measured by running the update
on tensors without storage and counting the live ones, which takes about a second for each batch
size at full size.
"""

import copy
import weakref
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cfgrl_gym.algorithms.flow import POSITIVE, interpolate, masked_mse
from cfgrl_gym.algorithms.memory.device import GIB, size_of, weights_of
from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.prefix import Prefix
from cfgrl_gym.algorithms.pi0.tokenizer import PALIGEMMA_PROMPT_TOKENS
from cfgrl_gym.algorithms.policies import UpdatePlan
from cfgrl_gym.wrappers.norm_stats import ACTION_DIM

# For the allocator's fragmentation, workspaces of matrix products, and the estimate's error.
HEADROOM = 0.05
ADAM_STATES = 2  # copies of every trained parameter: exp_avg and exp_avg_sq
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# transformers' PI0Model.embed_prefix; all that Python 3.10 gets
_PICKS_CAMERAS_BY_MASK = Version(transformers.__version__) < Version("5.23")


@dataclass(frozen=True)
class MemoryEstimate:
    """Holds the bytes on the device at the peak of an update, by part.

    :param weights: parameters and buffers
    :param gradients: gradients of the trained parameters
    :param optimizer: AdamW's two averages of every trained parameter
    :param average: the exponential moving average of the trained parameters, if there is one
    :param reference: weights of guidance's reference, if it has one
    :param prefix: keys and values of one micro-batch's images and language, if they are kept
    :param activations: everything else alive at the peak: what the backward pass needs and the
        weights that autocast casts; or, if that is more, the computation of a prefix or the
        optimizer's temporaries
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    reference: int
    prefix: int
    activations: int

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part, by name."""
        return asdict(self)


def estimate_update(
    model: Pi0ForCFGRL,
    batch_size: int,
    *,
    cameras: int,
    prompt_tokens: int = PALIGEMMA_PROMPT_TOKENS,
    device_type: str = "cuda",
    average: bool = False,
    reference: int = 0,
    two_prefixes: bool = False,
    accumulate: bool = True,
) -> MemoryEstimate:
    """Estimate the memory of one AdamW step on micro-batches of `batch_size` windows.

    Trained parameters, dtypes, adapters and gradient checkpointing are the model's own. If the VLM
    is frozen, its keys and values are kept with the windows. The estimate includes computing them
    again without gradients, and thereby also acting in `batch_size` environments at once.

    :param model: on any device, including the meta device; it is left unchanged
    :param cameras: images in each observation
    :param prompt_tokens: length of the tokenized prompts
    :param device_type: "cuda" (bfloat16 autocast) or "cpu" (the model's own dtypes)
    :param average: whether a moving average of the trained parameters is kept on the device
    :param reference: bytes of the weights of guidance's reference, which are kept there too
    :param two_prefixes: whether guidance's two branches have prefixes of their own
    :param accumulate: whether gradients of earlier micro-batches exist already
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = size_of(trained)
    cuda = device_type == "cuda"
    mode = FakeTensorMode()
    # The fake tensors claim to be on the CPU, whose autocast differs little from CUDA's.
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=cuda)
    with mode:
        fake = _without_storage(model)
        for parameter in fake.parameters():
            if accumulate and parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        inputs = example_inputs(fake, batch_size, cameras, prompt_tokens)
        prefix, prefix_size, vlm = None, 0, 0
        if not any(p.requires_grad for p in fake.model.vlm.parameters()):
            with torch.no_grad(), autocast, LiveBytes() as live:
                prefix = encode_example(fake, inputs)
            # An update needs one prefix for each row; acting and the guidance gap both branches'.
            prefix_size = live.now * (2 if two_prefixes else 1)
            vlm = live.peak - live.now
        with LiveBytes(cuda) as live:
            with autocast:
                loss = example_loss(fake, inputs, prefix)
            loss.backward()
    # Gradients that don't exist at the start are included in what was counted.
    step = max(live.peak, vlm) - (0 if accumulate else gradients)
    return MemoryEstimate(
        weights=size_of(weights_of(model)),
        gradients=gradients,
        optimizer=ADAM_STATES * gradients,
        average=gradients if average else 0,
        reference=reference,
        prefix=prefix_size,
        activations=max(step, _optimizer_temporaries(trained, cuda)),
    )


def plan_update(
    model: Pi0ForCFGRL, batch_size: int, *, free: int, device: str = "the device", **how: Any
) -> UpdatePlan:
    """Find the largest micro-batch, halving from `batch_size`, whose update fits.

    :param free: bytes for everything that the estimate counts, see `available_bytes`
    :param device: the device's name, for the message
    :param how: keywords of `estimate_update` except `accumulate`, which follows from the size
    :raises MemoryError: not even one window at a time fits; says how much is needed and what helps
    """
    usable = int(free / (1 + HEADROOM))
    size = batch_size
    while True:
        estimate = estimate_update(model, size, accumulate=size < batch_size, **how)
        if estimate.total <= usable:
            return UpdatePlan(size, estimate.total, usable - estimate.total)
        if size == 1:
            raise MemoryError(_refusal(model, estimate, free, device))
        fixed = estimate.total - estimate.prefix - estimate.activations
        size = (size + 1) // 2 if fixed <= usable else 1


def _optimizer_temporaries(trained: list[nn.Parameter], cuda: bool) -> int:
    """Return the bytes of AdamW's temporaries (torch/optim/adam.py): on CUDA (foreach)
    sqrt(exp_avg_sq) of all parameters at once; on the CPU that and its quotient of one parameter
    after the other, while the previous one's quotient is still alive."""
    sizes = [parameter.nbytes for parameter in trained]
    return sum(sizes) if cuda else 3 * max(sizes, default=0)


def example_inputs(
    model: Pi0ForCFGRL, batch: int, cameras: int, prompt_tokens: int
) -> dict[str, Tensor]:
    """Make inputs of zeros and ones, in the shapes and dtypes that `Pi0Policy` passes."""
    config: Any = model.config
    vision = config.vlm_config.vision_config
    tokens = cameras * (vision.image_size // vision.patch_size) ** 2 + prompt_tokens
    actions = (batch, config.chunk_size, config.max_action_dim)
    return {
        "input_ids": torch.zeros(batch, tokens, dtype=torch.int64),
        "attention_mask": torch.ones(batch, tokens, dtype=torch.int64),
        "pixel_values": torch.zeros(batch, cameras, 3, vision.image_size, vision.image_size),
        "pixel_attention_mask": torch.ones(batch, cameras, dtype=torch.bool),
        "state": torch.zeros(batch, config.max_state_dim),
        "noise": torch.zeros(actions),
        "actions": torch.zeros(actions),
        "is_pad": torch.zeros(actions[:2], dtype=torch.bool),
        "t": torch.zeros(batch),
        "labels": torch.full((batch,), POSITIVE),
    }


def encode_example(model: Pi0ForCFGRL, inputs: dict[str, Tensor]) -> Prefix:
    """Encode the prefix of `example_inputs`."""
    names = ("input_ids", "pixel_values", "pixel_attention_mask", "attention_mask")
    ids, pixels, cameras, mask = (inputs[name] for name in names)
    if _PICKS_CAMERAS_BY_MASK:  # a fake tensor can't tell how many; by their numbers it can
        cameras = torch.arange(cameras.shape[1], device=cameras.device).expand_as(cameras)
    return model.encode_prefix(ids, pixels, cameras, mask)


def example_loss(
    model: Pi0ForCFGRL, inputs: dict[str, Tensor], prefix: Prefix | None = None
) -> Tensor:
    """Compute the loss of `example_inputs` as `Pi0Policy` does in an update.

    :param prefix: the encoded prefix; None computes it, with gradients
    """
    noise, actions, t = inputs["noise"], inputs["actions"], inputs["t"]
    x_t = interpolate(actions, noise, t)
    known = encode_example(model, inputs) if prefix is None else prefix
    velocity = model.velocity(known, inputs["state"], x_t, t, inputs["labels"])
    return masked_mse(velocity.float(), noise - actions, inputs["is_pad"], ACTION_DIM).sum()


def _refusal(model: Pi0ForCFGRL, estimate: MemoryEstimate, free: int, device: str) -> str:
    """Say what doesn't fit, by part, and what would help this model."""
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in estimate.parts().items())
    vlm = list(model.model.vlm.parameters())
    trained = [parameter.requires_grad for parameter in vlm]
    helps = []
    if all(trained):
        helps.append("trainable='expert' or 'lora' instead of 'all'")
    elif any(trained):
        helps.append("trainable='expert' instead of 'lora'")
    if any(trained) and not model.checkpointing:
        helps.append("gradient_checkpointing=True")
    if any(not p.requires_grad and p.dtype == torch.float32 for p in vlm):
        helps.append("vlm_dtype='bfloat16'")
    if estimate.average:
        helps.append("no moving average of the weights")
    if estimate.reference:
        helps.append("cfg_reference='null'")
    helps.append("a device with more memory")
    return (
        f"an update on one window at a time needs {estimate.total * (1 + HEADROOM) / GIB:.2f} GiB "
        f"of memory (GiB: {parts}; and {HEADROOM:.0%} for the allocator), but {device} has "
        f"{free / GIB:.2f} GiB for it. What helps: {'; '.join(helps)}"
    )


def _without_storage(model: Pi0ForCFGRL) -> Pi0ForCFGRL:
    """Return a copy whose tensors claim to be on the CPU; to be called in a `FakeTensorMode`."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(model, memo)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that operations inside the context created.

    Memory that an operation frees before it returns isn't seen, except for the largest such case,
    if `cuda` is set: PyTorch's memory-efficient attention, which is used for a block mask on CUDA,
    accumulates the gradients of keys and values in float32
    (ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h, kNeedsAccumGradK).

    :ivar now: bytes alive
    :ivar peak: the most bytes that were alive at once

    >>> with FakeTensorMode(), LiveBytes() as live:
    ...     total = (torch.ones(1000) * 2).sum()
    >>> live.peak, live.now
    (8000, 4)
    """

    def __init__(self, cuda: bool = False) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._cuda = cuda
        self._known: set[int] = set()  # storages alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._add((args, kwargs), new=False)
        output = func(*args, **(kwargs or {}))
        self._add(output, new=True)
        if self._cuda and func is _ATTENTION_BACKWARD:
            _, _, keys, values, *_ = args
            self.peak = max(self.peak, self.now + 4 * (keys.numel() + values.numel()))
        return output

    def _add(self, tree: Any, new: bool) -> None:
        """Count new storages; storages that existed before cost nothing."""
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage._cdata in self._known:
                continue
            size = storage.nbytes() if new else 0
            self._known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
