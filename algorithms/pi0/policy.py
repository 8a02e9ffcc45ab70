"""Implements the PI0 policy: `CFGRL("Pi0Policy", env)`."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from cfgrl_gym.algorithms.guidance import BRANCHES
from cfgrl_gym.algorithms.pi0.checkpoints.build import POLICY_FILE, Trainable, VlmDtype, build
from cfgrl_gym.algorithms.pi0.checkpoints.reference import (
    read_reference,
    write_reference,
)
from cfgrl_gym.algorithms.pi0.checkpoints.stats import STATS_FILE
from cfgrl_gym.algorithms.pi0.condition import ConditionMode
from cfgrl_gym.algorithms.pi0.inputs import check_spaces, encode_cameras, to_tensors
from cfgrl_gym.algorithms.pi0.label_prompts import LabelPrompts
from cfgrl_gym.algorithms.pi0.lora import LORA_RANK, check_lora, merged_state_dict, set_trainable
from cfgrl_gym.algorithms.pi0.memory import plan_update
from cfgrl_gym.algorithms.pi0.prefix import Prefix, join
from cfgrl_gym.algorithms.pi0.presets import Preset, TinySizes
from cfgrl_gym.algorithms.pi0.tokenizer import PaliGemmaTokenizer
from cfgrl_gym.algorithms.policies import (
    FlowPolicy,
    Inputs,
    Observation,
    Prefixes,
    PrefixRow,
    UpdatePlan,
)
from cfgrl_gym.wrappers.norm_stats import Moments, NormStats
from cfgrl_gym.wrappers.transforms import ActionsFromModel, ActionsToModel, Normalize, pad_last

# openpi, training/optimizer.py
OPENPI_ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-10}

FULL_SIZE = 1024  # smallest width of an action expert that counts as full size
FULL_LEARNING_RATE = 2.5e-5  # openpi's peak in fine-tuning: training/optimizer.py
SMALL_LEARNING_RATE = 5e-4  # chosen on libero_tiny: docs/study.md


class Pi0Policy(FlowPolicy):
    """Makes a CFGRL policy of PI0 with an optimality condition, for LIBERO's observations.

    :param observation_space: Dict of uint8 images (H, W, 3) under PI0's camera names (base_0_rgb;
        optionally left_wrist_0_rgb and right_wrist_0_rgb), state float32 (8,) and prompt uint8 (N,)
    :param action_space: Box (chunk, 7) or (7,)
    :param lr_schedule: learning rate as a function of the remaining progress
    :param preset: "tiny" (random weights, byte-level tokenizer, for a CPU) or "pi0" (full size)
    :param checkpoint: folder that `save_pretrained` wrote, or "libero_tiny", which comes with the
        package; with preset "pi0", any PI0 checkpoint folder or hub name. None: random weights.
        With `cfg_reference`, a folder's reference goes on to be that of this policy
    :param norm_stats: a `NormStats` or the path of openpi's norm_stats.json. None: the checkpoint
        folder's; without a checkpoint, tiny takes mean 0 and standard deviation 1 (states
        and actions are not changed)
    :param condition_mode: how the optimality condition enters: "token", "bias" or "concat", each of
        which starts as a no-op; or "text", words after the instruction: see `label_prompts.py`.
        None: the checkpoint's own, "bias" if it has none, and "token" without a checkpoint
    :param use_prefix_dropout: hide the instruction from the ∅ branch too. The prefix then differs
        between the branches and is computed once for each
    :param delta_actions: whether the model's actions are the environment's minus the state in the
        first 6 dimensions. None: the checkpoint's, else True for "pi0" and False for "tiny"
    :param trainable: "expert" (the VLM is frozen), "all", or "lora" (adapters on language model
        and expert: see `pi0/lora.py`; needs peft). None: "expert" with a checkpoint, else "all"
    :param lora_rank: with trainable "lora": rank of the language model's adapters; the expert's
        is twice that
    :param gradient_checkpointing: keep only each layer's input for the backward pass and recompute
        the rest: less memory, more time
    :param horizon: action steps that the model predicts. None: the checkpoint's, else the
        action space's chunk
    :param sizes: sizes of a new tiny model
    :param seed: seed of the weights of a new model and of new adapters; None draws them from the
        global generator
    :param vlm_dtype: "float32" or "bfloat16", the dtype of the VLM's weights if they are frozen;
        trained weights are float32. None: "bfloat16" with preset "pi0", else "float32"
    :param tokenizer: preset "pi0": folder or hub name of the tokenizer. None: the checkpoint's
        own, else PaliGemma's on the hub
    :param model_config: configuration of a new model as transformers writes it; overrides
        `sizes`. `save` stores it, to rebuild the network before its weights are loaded
    :param base: SHA-256 that each of the checkpoint's weight files must have, by file name. `save`
        stores it for a checkpoint whose frozen weights it doesn't repeat
    :param cameras: the cameras whose images the policy looks at. None: the checkpoint's, else all
    :param compile_denoising: run the denoising steps through torch.compile (on a GPU with CUDA
        graphs). The first chunk of each batch size then takes minutes at full size, and after
        eight different shapes, new shapes run uncompiled
    :param ema_decay: act with an exponential moving average of the trained weights that decays by
        this factor each optimizer step; None: act with the weights themselves
    :param optimizer_class: class of `policy.optimizer`
    :param optimizer_kwargs: arguments of the optimizer. None: openpi's settings if it is AdamW
    :param kwargs: arguments of `FlowPolicy` (cfg_scale, num_inference_steps, guidance,
        cfg_reference)

    >>> policy = Pi0Policy(env.observation_space, env.action_space, lambda _: 1e-3)
    ... # doctest: +SKIP
    """

    saved_types = (NormStats, Moments)

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        preset: Preset = "tiny",
        checkpoint: str | Path | None = None,
        norm_stats: NormStats | str | Path | None = None,
        condition_mode: ConditionMode | None = None,
        use_prefix_dropout: bool | None = None,
        delta_actions: bool | None = None,
        trainable: Trainable | None = None,
        lora_rank: int = LORA_RANK,
        gradient_checkpointing: bool = False,
        horizon: int | None = None,
        sizes: TinySizes | None = None,
        seed: int | None = 0,
        vlm_dtype: VlmDtype | None = None,
        tokenizer: str | None = None,
        model_config: dict[str, Any] | None = None,
        base: dict[str, str] | None = None,
        cameras: Sequence[str] | None = None,
        compile_denoising: bool = False,
        ema_decay: float | None = 0.98,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        available = check_spaces(observation_space, action_space)
        if trainable == "lora":
            check_lora(lora_rank)  # before a checkpoint is loaded, which takes minutes
        parts = build(
            {
                "preset": preset,
                "condition_mode": condition_mode,
                "use_prefix_dropout": use_prefix_dropout,
                "delta_actions": delta_actions,
                "trainable": trainable,
                "vlm_dtype": vlm_dtype,
                "tokenizer": tokenizer,
                "cameras": cameras,
            },
            checkpoint=checkpoint,
            base=base,
            norm_stats=norm_stats,
            model_config=model_config,
            sizes=sizes,
            horizon=horizon,
            chunk_size=action_space.shape[0] if len(action_space.shape) == 2 else 1,
            seed=seed,
            available=available,
        )
        config: Any = parts.model.config
        if optimizer_kwargs is None and optimizer_class is torch.optim.AdamW:
            optimizer_kwargs = dict(OPENPI_ADAMW)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            horizon=config.chunk_size,
            action_width=config.max_action_dim,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            ema_decay=ema_decay,
            **kwargs,
        )
        self.config = parts.config
        self.base = parts.base
        self.cameras = parts.config.cameras or available
        self.tokenizer = parts.tokenizer
        self.model = parts.model
        vision = config.vlm_config.vision_config
        self.image_size: int = vision.image_size
        self.image_tokens = len(self.cameras) * (vision.image_size // vision.patch_size) ** 2
        self.prompts = LabelPrompts(
            parts.tokenizer,
            config.vlm_config.image_token_id,
            self.image_tokens,
            in_words=parts.config.condition_mode == "text",
            hides_null=parts.config.use_prefix_dropout,
        )
        self.set_norm_stats(parts.norm_stats)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.model.checkpoint_layers()
        self.compile_denoising = compile_denoising
        velocities = self.model.branch_velocities
        self._branch_velocities = _compiled(velocities) if compile_denoising else velocities
        self.lora_rank = lora_rank
        set_trainable(self.model, self.config.trainable, lora_rank, seed)
        self.frozen_prefix = self.has_value_features = self.config.trainable == "expert"
        full_size = config.dit_config.hidden_size >= FULL_SIZE
        self.default_learning_rate = FULL_LEARNING_RATE if full_size else SMALL_LEARNING_RATE
        trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = optimizer_class(
            trained,
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )
        self.copy_weights()
        if parts.reference is not None:
            self._set_reference(parts.reference)

    def _set_reference(self, file: Path) -> None:
        """Give guidance the reference that the checkpoint's folder has."""
        if self.reference is not None:
            self.reference.put(read_reference(file, dict(self.named_parameters())))
        else:
            warnings.warn(
                f"the policy in '{file.parent}' was trained with the guidance reference in "
                f"{file.name}; with cfg_reference='null' guidance gives other actions: pass "
                "'start' or 'previous'",
                stacklevel=3,
            )

    # Normalisation ----------------------------------------------------------------------------

    @property
    def norm_stats(self) -> NormStats:
        """Return the normalisation statistics in use, float32, without the quantiles."""
        state, actions = (
            Moments(*(tuple(self.get_buffer(f"{part}_{of}").tolist()) for of in ("mean", "std")))
            for part in ("state", "actions")
        )
        return NormStats(state, actions)

    def set_norm_stats(self, stats: NormStats) -> None:
        """Use these statistics from now on; they are saved with the weights."""
        for part, moments in (("state", stats.state), ("actions", stats.actions)):
            for name in ("mean", "std"):
                value = torch.tensor(getattr(moments, name), dtype=torch.float32)
                self.register_buffer(f"{part}_{name}", value.to(self.device))

    def encode_actions(self, inputs: Inputs, actions: Tensor) -> Tensor:
        normalize = Normalize(self.actions_mean, self.actions_std)
        transform = ActionsToModel(normalize, self.action_width, self.config.delta_actions)
        return transform(actions.to(self.device, torch.float32), inputs["raw_state"])

    def decode_actions(self, inputs: Inputs, model_actions: Tensor) -> Tensor:
        unnormalize = Normalize(self.actions_mean, self.actions_std).inverse
        transform = ActionsFromModel(unnormalize, self.action_dim, self.config.delta_actions)
        return transform(model_actions, inputs["raw_state"])

    # The network ------------------------------------------------------------------------------

    def encode_observation(self, obs: Observation, *, skip_prefix: bool = False) -> Inputs:
        """Convert a batched observation (NumPy arrays or tensors) to model inputs.

        :param skip_prefix: return only state and raw_state, if the prefix is known
        :return: input_ids, attention_mask, instruction_mask int64 (batch, tokens), of ∅; prompt
            uint8 (batch, N); pixel_values float32 (batch, cameras, 3, size, size) in [-1, 1];
            pixel_attention_mask bool (batch, cameras); state float32 (batch, max_state_dim),
            normalised and padded; raw_state float32 (batch, 8)
        :raises ValueError: a part is missing or has the wrong shape
        """
        needed = ("state",) if skip_prefix else (*self.cameras, "state", "prompt")
        parts = to_tensors(obs, needed, self.device)
        raw_state = parts["state"].float()
        state = Normalize(self.state_mean, self.state_std)(raw_state)
        padded = pad_last(state, self.model.config.max_state_dim)
        inputs = {"state": padded, "raw_state": raw_state}
        if skip_prefix:
            return inputs
        text = self.prompts.encode(parts["prompt"])
        pixels = encode_cameras(parts, self.cameras, self.image_size)
        # A missing camera's slot is left out, which is equivalent to masking it.
        there = torch.ones(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
        text["prompt"] = parts["prompt"]
        return {**inputs, **text, "pixel_values": pixels, "pixel_attention_mask": there}

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context that computes in bfloat16 on a GPU that has it; weights stay float32."""
        use = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=use)

    def encode_prefix(self, inputs: Inputs, labels: Tensor) -> Prefix:
        """Compute the keys and values of the VLM for the prompt that each row's label has.

        :param inputs: from `encode_observation`, with image_embeds (batch, tokens, hidden) if the
            images are embedded already
        """
        worded = self.prompts.with_condition(inputs, labels)
        ids, images = worded["input_ids"], worded.get("image_embeds")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_prefix):
            embeds = None
            if images is not None:
                embeds = self.model.embed_after(images, ids[:, self.image_tokens :])
            return self.model.encode_prefix(
                ids,
                worded["pixel_values"],
                worded["pixel_attention_mask"],
                worded["attention_mask"],
                embeds,
            )

    def prefix_label(self, label: int) -> int:
        return self.prompts.representative(label)

    def encode_prefixes(self, inputs: Inputs, branches: tuple[int, ...]) -> Prefixes:
        """Compute the prefix under each label; images are embedded once for all prompts."""
        if len({self.prefix_label(label) for label in branches}) > 1:
            ids = inputs["input_ids"][:, : self.image_tokens]
            pixels, there = inputs["pixel_values"], inputs["pixel_attention_mask"]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_prefix):
                inputs = {**inputs, "image_embeds": self.model.embed_images(ids, pixels, there)}
        return super().encode_prefixes(inputs, branches)

    def split_prefix(self, prefix: Prefix) -> list[PrefixRow]:
        return [vars(row) for row in prefix.rows()]

    def join_prefix(self, rows: Sequence[PrefixRow]) -> Prefix:
        return join([Prefix(**row) for row in rows])

    def value_features(self, inputs: Inputs, prefix: Prefix) -> Tensor:
        """Return the last layer's values, averaged over the tokens, and the normalised state.

        Keys are left out, because they are rotated by their position.
        """
        there = prefix.attention_mask[:, None, :, None].float()  # (batch, 1, tokens, 1)
        values = prefix.keys_values[:, -1, 1].float()  # (batch, kv_heads, tokens, head_dim)
        pooled = (values * there).sum(2) / there.sum(2)  # (batch, kv_heads, head_dim)
        return torch.cat([pooled.flatten(1), inputs["state"]], 1)

    def velocity(
        self, inputs: Inputs, x_t: Tensor, t: Tensor, labels: Tensor, prefix: Prefix | None = None
    ) -> Tensor:
        known = self.encode_prefix(inputs, labels) if prefix is None else prefix
        return self.model.velocity(known, inputs["state"], x_t, t, labels)

    def velocities(
        self,
        inputs: Inputs,
        x_t: Tensor,
        t: Tensor,
        branches: tuple[int, ...],
        prefixes: Prefixes,
    ) -> tuple[Tensor, ...]:
        """Compute all branches in one pass of the expert, if they have the same prefix."""
        state = inputs["state"]
        run = self._branch_velocities
        if self.reference is not None and self.reference.in_use:
            run = self.model.branch_velocities  # a CUDA graph knows the policy's own weights only
        first = prefixes[branches[0]]
        if all(prefixes[label] is first for label in branches):
            return run(first, state, x_t, t, branches)
        return tuple(run(prefixes[label], state, x_t, t, (label,))[0] for label in branches)

    def plan_update(self, batch_size: int, free: int) -> UpdatePlan:
        """Plan an update (see `FlowPolicy`) from an estimate that allocates nothing."""
        return plan_update(
            self.model,
            batch_size,
            free=free,
            device=str(self.device),
            device_type=self.device.type,
            cameras=len(self.cameras),
            prompt_tokens=self.tokenizer.max_tokens,
            average=self.average is not None,
            reference=0 if self.reference is None else self.reference.size,
            two_prefixes=len({self.prefix_label(label) for label in BRANCHES}) > 1,
        )

    def fsdp_units(self) -> list[nn.Module]:
        return self.model.fsdp_units()

    def copy_to_train(self, *, bare: bool = False) -> "Pi0Policy":
        copied = super().copy_to_train(bare=bare)
        copied._branch_velocities = copied.model.branch_velocities  # compiled: this one's weights
        return copied

    # Saving -----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model (model.safetensors, config.json), norm_stats.json, the policy's
        configuration (pi0_policy.json) and the tokenizer's files.

        `Pi0Policy(..., checkpoint=folder)` restores it; transformers' own
        `PI0ForConditionalGeneration.from_pretrained(folder)` loads the unconditional model.

        Adapters (trainable "lora") are written merged into the weights: the folder is an ordinary
        checkpoint, and a policy made from it with trainable="lora" starts with new adapters on the
        merged weights. This policy is not changed. `save` stores the adapters themselves.
        With `ema_decay` the averaged weights are written, because those act. What guidance's
        reference has of its own (`cfg_reference`) is written to reference.safetensors.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        training = self.training
        self.set_training_mode(False)
        merged = merged_state_dict(self.model) if self.config.trainable == "lora" else None
        self.model.save_pretrained(folder, state_dict=merged)
        write_reference(folder, self.model, self.reference)
        self.set_training_mode(training)
        self.norm_stats.save(folder / STATS_FILE)
        if isinstance(self.tokenizer, PaliGemmaTokenizer):
            self.tokenizer.save_pretrained(folder)
        text = json.dumps(asdict(self.config), indent=2) + "\n"
        (folder / POLICY_FILE).write_text(text, encoding="utf-8")

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            **asdict(self.config),
            "norm_stats": self.norm_stats,
            "lora_rank": self.lora_rank,
            "gradient_checkpointing": self.gradient_checkpointing,
            "horizon": self.horizon,
            "model_config": json.loads(self.model.config.to_json_string(use_diff=False)),
            "compile_denoising": self.compile_denoising,
        }

    def constructor_arguments(self) -> dict[str, Any]:
        arguments = super().constructor_arguments()
        hashes = self._base_hashes()
        if hashes is not None:
            assert self.base is not None
            arguments |= {"checkpoint": self.base.name, "base": hashes, "model_config": None}
            tokenizer = self.config.tokenizer
            if tokenizer and Path(tokenizer).resolve() == self.base.folder:
                arguments["tokenizer"] = None  # it is in the checkpoint, and moves with it
        return arguments

    def _base_hashes(self) -> dict[str, str] | None:
        """Return hashes of the checkpoint with the frozen weights; None if these must be saved."""
        if self.base is None or not self._frozen():
            return None
        hashes = self.base.hashes()
        if hashes is None:
            warnings.warn(
                f"the base checkpoint '{self.base.name}' has changed since it was loaded: all of "
                "the weights are saved, not only what was trained",
                stacklevel=4,
            )
        return hashes

    def _frozen(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named_parameters() if not p.requires_grad}

    def state_to_save(self) -> dict[str, Any]:
        """Return the state dict, without frozen weights that the base checkpoint has."""
        state = self.state_dict()
        if self._base_hashes() is None:
            return state
        frozen = self._frozen()
        return {name: value for name, value in state.items() if name not in frozen}

    def complete_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**self._frozen(), **state}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict as torch does; frozen weights other than the base's will be saved."""
        if self.base is not None and any(
            name in state_dict and not torch.equal(own, state_dict[name].to(own))
            for name, own in self._frozen().items()
        ):
            self.base = None
        return super().load_state_dict(state_dict, strict, assign)


def _compiled(branch_velocities: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Compile `Pi0ForCFGRL.branch_velocities` for each shape it is called with; on a GPU as CUDA
    graphs.

    `fullgraph` is not set, because it makes the ninth shape an error (torch's recompile_limit), and
    a collection has a batch size for each number of environments that are still busy. Without it,
    shapes after the eighth run uncompiled.
    """
    graph = torch.compile(branch_velocities, dynamic=False, mode="reduce-overhead")

    def call(*args: Any) -> tuple[Tensor, ...]:
        # A CUDA graph writes the outputs of every call to the same memory.
        return tuple(velocity.clone() for velocity in graph(*args))

    return call
