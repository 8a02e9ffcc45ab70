"""The PI0 policy: `CFGRL("Pi0Policy", env)`."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from cfgrl_gym.algorithms.flow import NULL
from cfgrl_gym.algorithms.pi0.checkpoints.base import BaseReference
from cfgrl_gym.algorithms.pi0.checkpoints.build import Trainable, build, save_checkpoint
from cfgrl_gym.algorithms.pi0.checkpoints.on_base import OnBase
from cfgrl_gym.algorithms.pi0.compiled import compiled
from cfgrl_gym.algorithms.pi0.condition import ConditionMode
from cfgrl_gym.algorithms.pi0.inputs import (
    check_spaces,
    encode_cameras,
    encode_text,
    to_tensors,
)
from cfgrl_gym.algorithms.pi0.lora import LORA_RANK, add_lora, check_lora, merged_state_dict
from cfgrl_gym.algorithms.pi0.memory import plan_update
from cfgrl_gym.algorithms.pi0.prefix import Prefix, join, select_rows
from cfgrl_gym.algorithms.pi0.presets import Preset, TinySizes
from cfgrl_gym.algorithms.policies import Guidance, Inputs, Observation, PrefixRow, UpdatePlan
from cfgrl_gym.wrappers.norm_stats import Moments, NormStats
from cfgrl_gym.wrappers.transforms import (
    ActionsFromModel,
    ActionsToModel,
    Normalize,
    pad_last,
)

# openpi, training/optimizer.py
OPENPI_ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-10}


class Pi0Policy(OnBase):
    """PI0 with an optimality condition, for LIBERO's observations.

    :param observation_space: Dict of uint8 images (H, W, 3) under PI0's camera names (base_0_rgb;
        left_wrist_0_rgb and right_wrist_0_rgb where there are any), state float32 (8,) and
        prompt uint8 (N,)
    :param action_space: Box (chunk, 7) or (7,)
    :param lr_schedule: learning rate as a function of the remaining progress
    :param preset: "tiny" (random weights, byte-level tokenizer, for a CPU) or "pi0" (full size)
    :param checkpoint: folder that `save_pretrained` wrote, or "libero_tiny", which comes with the
        package; with preset "pi0", any PI0 checkpoint folder or hub name. None: random weights
    :param norm_stats: a `NormStats` or the path of openpi's norm_stats.json. None: the checkpoint
        folder's; without a checkpoint, tiny takes mean 0 and standard deviation 1 (states
        and actions reach the model as they are)
    :param condition_mode: how the optimality condition enters: "token", "bias" or "concat". None:
        the checkpoint's, else "token"
    :param cfg_scale: w of guidance; `policy.cfg_scale` may be changed at any time. None: 1.0, or
        the environment variable PI0_CFG_SCALE
    :param use_prefix_dropout: the ∅ branch doesn't see the instruction either. The prefix then
        differs between the branches and is computed once for each
    :param delta_actions: the model's actions are the environment's minus the state in the first
        6 dimensions. None: the checkpoint's, else True for "pi0" and False for "tiny"
    :param trainable: "expert" (the VLM is frozen), "all", or "lora" (adapters on language model
        and expert: see `pi0/lora.py`; needs peft). None: "expert" with a checkpoint of preset
        "pi0", else "all"
    :param lora_rank: with trainable "lora": rank of the language model's adapters; the expert's
        is twice that
    :param gradient_checkpointing: keep only each layer's input for the backward pass and compute
        the rest again: less memory, more time
    :param horizon: action steps that the model predicts. None: the checkpoint's, else the
        action space's chunk
    :param sizes: sizes of a new tiny model
    :param seed: of a new model's weights and of the adapters'; None draws them from the global
        generator
    :param vlm_dtype: "float32" or "bfloat16": of the VLM's weights where they are frozen; all that
        trains is float32. None: "bfloat16" with preset "pi0", else "float32"
    :param tokenizer: preset "pi0": folder or hub name of the tokenizer. None: the checkpoint's
        own, else PaliGemma's on the hub
    :param model_config: configuration of a new model as transformers writes it; overrides
        `sizes`. What `save` keeps, to rebuild the network before its weights are loaded
    :param base: what `CFGRL.save` keeps of the checkpoint, to know whether it has changed
    :param cameras: of the observations' images, those that the policy looks at. None: the
        checkpoint's, else all
    :param num_inference_steps: Euler steps of the sampler
    :param guidance: "velocity" guides every denoising step; "action" combines two finished chunks
    :param ema_decay: act with an exponential moving average of the trained weights, of this decay
        an optimizer step; None: with the weights themselves
    :param compile_denoising: run the denoising steps through torch.compile (on a GPU with CUDA
        graphs). The first chunk of each batch size then takes minutes at full size, and after
        eight different shapes new ones run as without it
    :param optimizer_class: of `policy.optimizer`
    :param optimizer_kwargs: None: openpi's AdamW settings where the class is AdamW

    >>> policy = Pi0Policy(env.observation_space, env.action_space, lambda _: 1e-3)
    ... # doctest: +SKIP
    """

    saved_types = (NormStats, Moments, BaseReference)

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
        cfg_scale: float | None = None,
        use_prefix_dropout: bool | None = None,
        delta_actions: bool | None = None,
        trainable: Trainable | None = None,
        lora_rank: int = LORA_RANK,
        gradient_checkpointing: bool = False,
        horizon: int | None = None,
        sizes: TinySizes | None = None,
        seed: int | None = 0,
        vlm_dtype: Literal["float32", "bfloat16"] | None = None,
        tokenizer: str | None = None,
        model_config: dict[str, Any] | None = None,
        base: BaseReference | None = None,
        cameras: Sequence[str] | None = None,
        num_inference_steps: int = 10,
        guidance: Guidance = "velocity",
        ema_decay: float | None = None,
        compile_denoising: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
    ) -> None:
        available = check_spaces(observation_space, action_space)
        if trainable == "lora":
            check_lora(lora_rank)  # before a checkpoint is loaded, which takes minutes
        shape = action_space.shape
        built = build(
            preset=preset,
            checkpoint=checkpoint,
            norm_stats=norm_stats,
            condition_mode=condition_mode,
            use_prefix_dropout=use_prefix_dropout,
            delta_actions=delta_actions,
            trainable=trainable,
            horizon=horizon,
            chunk_size=shape[0] if len(shape) == 2 else 1,
            sizes=sizes,
            seed=seed,
            vlm_dtype=vlm_dtype,
            tokenizer=tokenizer,
            model_config=model_config,
            base=base,
            cameras=cameras,
            available=available,
        )
        config = built.model.config
        if optimizer_kwargs is None and optimizer_class is torch.optim.AdamW:
            optimizer_kwargs = dict(OPENPI_ADAMW)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            horizon=config.chunk_size,
            action_width=config.max_action_dim,
            cfg_scale=cfg_scale,
            num_inference_steps=num_inference_steps,
            guidance=guidance,
            ema_decay=ema_decay,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            normalize_images=normalize_images,
        )
        self.config = built.config
        self.base = built.base
        self.cameras = built.config.cameras or available
        self.tokenizer = built.tokenizer
        self.model = built.model
        vlm: Any = config.vlm_config
        vision = vlm.vision_config
        self.image_size = vision.image_size
        self.image_token_id: int = vlm.image_token_id
        self.image_tokens = len(self.cameras) * (vision.image_size // vision.patch_size) ** 2
        for part in ("state", "actions"):
            for name in ("mean", "std"):
                self.register_buffer(f"{part}_{name}", torch.empty(0))
        self.set_norm_stats(built.norm_stats)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.model.checkpoint_layers()
        self.compile_denoising = compile_denoising
        self._branch_velocities = self.model.branch_velocities
        if compile_denoising:
            self._branch_velocities = compiled(self.model.branch_velocities)
        self.frozen_prefix = self.config.trainable == "expert"
        if self.frozen_prefix:
            self.model.model.vlm.requires_grad_(False)
        elif self.config.trainable == "lora":
            add_lora(self.model, lora_rank, seed)
        self.lora_rank = lora_rank
        trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = optimizer_class(
            trained,
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )
        self.start_average()

    # Normalisation ----------------------------------------------------------------------------

    @property
    def norm_stats(self) -> NormStats:
        """The statistics in use (float32; without quantiles, which PI0 doesn't need)."""
        moments = [
            Moments(
                tuple(getattr(self, f"{part}_mean").tolist()),
                tuple(getattr(self, f"{part}_std").tolist()),
            )
            for part in ("state", "actions")
        ]
        return NormStats(*moments)

    def set_norm_stats(self, stats: NormStats) -> None:
        """Use these statistics from now on; they are saved with the weights."""
        for part, moments in (("state", stats.state), ("actions", stats.actions)):
            for name in ("mean", "std"):
                value = torch.tensor(getattr(moments, name), dtype=torch.float32)
                setattr(self, f"{part}_{name}", value.to(self.device))

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
        """Model inputs of a batched observation (NumPy arrays or tensors).

        :param skip_prefix: only state and raw_state, for a prefix that is known
        :return: input_ids, attention_mask, instruction_mask int64 (batch, tokens); pixel_values
            float32 (batch, cameras, 3, size, size) in [-1, 1]; pixel_attention_mask bool (batch,
            cameras); state float32 (batch, max_state_dim), normalised and padded; raw_state
            float32 (batch, 8)
        :raises ValueError: a part is missing or has the wrong shape
        """
        needed = ("state",) if skip_prefix else (*self.cameras, "state", "prompt")
        parts = to_tensors(obs, needed, self.device)
        raw_state = parts["state"].float()
        state = Normalize(self.state_mean, self.state_std)(raw_state)
        inputs = {
            "state": pad_last(state, self.model.config.max_state_dim),
            "raw_state": raw_state,
        }
        if skip_prefix:
            return inputs
        pixels = encode_cameras(parts, self.cameras, self.image_size)
        return {
            **inputs,
            **encode_text(
                parts["prompt"],
                self.tokenizer,
                self.image_token_id,
                self.image_tokens,
            ),
            # A missing camera's slot is dropped, which equals masking it.
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(
                pixels.shape[:2], dtype=torch.bool, device=pixels.device
            ),
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 on a GPU that has it; the trained weights themselves stay float32."""
        use = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=use)

    def _prefix(self, inputs: Inputs, attention_mask: Tensor) -> Prefix:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_prefix):
            return self.model.encode_prefix(
                inputs["input_ids"],
                inputs["pixel_values"],
                inputs["pixel_attention_mask"],
                attention_mask,
            )

    def encode_prefix(self, inputs: Inputs) -> tuple[Prefix, Prefix]:
        """The VLM's keys and values for (labelled, ∅) rows; one and the same object unless
        `use_prefix_dropout` hides the instruction from ∅."""
        prefix = self._prefix(inputs, inputs["attention_mask"])
        if not self.config.use_prefix_dropout:
            return prefix, prefix
        return prefix, self._prefix(inputs, _without_instruction(inputs))

    def split_prefix(self, prefix: tuple[Prefix, Prefix]) -> list[PrefixRow]:
        names = ("labelled", "null") if self.config.use_prefix_dropout else ("labelled",)
        rows: list[PrefixRow] = [{} for _ in range(len(prefix[0].attention_mask))]
        for name, branch in zip(names, prefix, strict=False):
            for row, one in zip(rows, branch.rows(), strict=True):
                row[name] = one.keys_values
                row[f"{name}_mask"] = one.attention_mask
        return rows

    def join_prefix(self, rows: Sequence[PrefixRow]) -> tuple[Prefix, Prefix]:
        labelled = join([Prefix(row["labelled"], row["labelled_mask"]) for row in rows])
        if not self.config.use_prefix_dropout:
            return labelled, labelled
        return labelled, join([Prefix(row["null"], row["null_mask"]) for row in rows])

    def velocity(
        self, inputs: Inputs, x_t: Tensor, t: Tensor, labels: Tensor, prefix: Any = None
    ) -> Tensor:
        if prefix is None:
            mask = inputs["attention_mask"]
            if self.config.use_prefix_dropout:
                mask = torch.where((labels == NULL)[:, None], _without_instruction(inputs), mask)
            chosen = self._prefix(inputs, mask)
        else:
            labelled, null = prefix
            chosen = labelled if labelled is null else select_rows(labels == NULL, null, labelled)
        return self.model.velocity(chosen, inputs["state"], x_t, t, labels)

    def velocities(
        self, inputs: Inputs, x_t: Tensor, t: Tensor, branches: tuple[int, ...], prefix: Any
    ) -> tuple[Tensor, ...]:
        """One pass of the expert for all branches that share a prefix."""
        labelled, null = prefix
        state = inputs["state"]
        if labelled is null:
            return self._branch_velocities(labelled, state, x_t, t, branches)
        return tuple(
            self._branch_velocities(null if label == NULL else labelled, state, x_t, t, (label,))[0]
            for label in branches
        )

    def plan_update(self, batch_size: int, free: int) -> UpdatePlan:
        """See `FlowPolicy`; from an estimate that allocates nothing, in a second."""
        plan = plan_update(
            self.model,
            batch_size,
            free=free,
            device=str(self.device),
            device_type=self.device.type,
            cameras=len(self.cameras),
            prompt_tokens=self.tokenizer.pad_to or self.tokenizer.max_tokens,
            average=self.average is not None,
            two_prefixes=self.config.use_prefix_dropout,
        )
        return UpdatePlan(plan.batch_size, plan.estimate.total, plan.prefix_room)

    # Saving -----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model (safetensors), norm_stats.json and the policy's configuration.

        `Pi0Policy(..., checkpoint=folder)` restores it; transformers' own
        `PI0ForConditionalGeneration.from_pretrained(folder)` loads the unconditional model.

        Adapters (trainable "lora") are written merged into the weights: the folder is an ordinary
        checkpoint, and a policy made from it with trainable="lora" starts with fresh adapters on
        the merged weights. This policy stays as it is. `save` keeps the adapters themselves.
        With `ema_decay` it is the average that is written: what acts.
        """
        training = self.training
        self.set_training_mode(False)
        merged = merged_state_dict(self.model) if self.config.trainable == "lora" else None
        save_checkpoint(
            Path(folder), self.model, self.norm_stats, self.config, self.tokenizer, merged
        )
        self.set_training_mode(training)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            lr_schedule=self._dummy_schedule,  # as SB3's policies do: schedules may not pickle
            preset=self.config.preset,
            norm_stats=self.norm_stats,
            condition_mode=self.config.condition_mode,
            cfg_scale=self.cfg_scale,
            use_prefix_dropout=self.config.use_prefix_dropout,
            delta_actions=self.config.delta_actions,
            trainable=self.config.trainable,
            lora_rank=self.lora_rank,
            gradient_checkpointing=self.gradient_checkpointing,
            horizon=self.horizon,
            vlm_dtype=self.config.vlm_dtype,
            tokenizer=self.config.tokenizer,
            cameras=self.cameras,
            model_config=json.loads(self.model.config.to_json_string(use_diff=False)),
            num_inference_steps=self.num_inference_steps,
            guidance=self.guidance,
            ema_decay=self.ema_decay,
            compile_denoising=self.compile_denoising,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
        )
        return data


def _without_instruction(inputs: Inputs) -> Tensor:
    """The attention mask with the instruction's tokens hidden: what an empty prompt would give."""
    return inputs["attention_mask"] * (1 - inputs["instruction_mask"])
