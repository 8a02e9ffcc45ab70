"""Adds an optimality condition o ∈ {∅, 0, 1} to transformers' PI0, and nothing else."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PI0ForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gemma.modeling_gemma import GemmaMLP, apply_rotary_pos_emb
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from cfgrl_gym.algorithms.flow import NULL, interpolate, sample_noise, sample_time
from cfgrl_gym.algorithms.pi0.condition import OptimalityCondition, Pi0CFGRLConfig, as_labels
from cfgrl_gym.algorithms.pi0.prefix import CACHE, Prefix, run_prefix

# The tokens of one branch (batch, n, hidden), of which the last chunk_size are the actions. In
# "token" mode the condition precedes them, and bool (batch,) says which rows have one.
Block = tuple[Tensor, Tensor | None]


class Pi0ForCFGRL(PI0ForConditionalGeneration):
    """Extends PI0 by a velocity that may be conditioned on optimality.

    `forward` takes transformers' own arguments plus `is_positive`: None (∅), 0, 1, or an integer
    tensor (batch,) with -1 for ∅. A batch in which all rows are ∅ runs transformers' own forward,
    unchanged. In a mixed batch every row's result is, up to rounding, what it would be alone:

    - "token": the suffix becomes [state, condition, actions...]. The condition is a second state
      token with the embedding added: it has the state's position and attends to prefix, state and
      itself. The actions attend to both, and the two share the attention that the state alone has
      otherwise. So a zero embedding changes nothing, and the action tokens keep their positions. In
      a ∅ row the condition token is masked out, and the state token has its full weight.
    - "bias": the embedding is added to every action token.
    - "concat": the embedding is concatenated into the input of `action_time_mlp_in`.
    - "text": the condition is words in the prompt, that is in `input_ids`, so every label has a
      prefix of its own, and the expert does the same for all. `forward` takes no label but ∅ then.

    Training and acting use `velocity` and `branch_velocities`: an expert pass over a prefix that
    was computed before, with no control flow that depends on data.

    transformers' part of the state dict keeps transformers' names; the condition's parameters are
    `condition.*`, and are initialised afresh when a checkpoint has none.
    """

    config_class = Pi0CFGRLConfig
    # dit.embed_tokens is never read (the expert takes embeddings): see `drop_unused_embeddings`.
    # Checkpoints of other projects lack the condition.
    _keys_to_ignore_on_load_missing = [r"dit\.embed_tokens", r"^condition\."]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"dit\.embed_tokens"]  # noqa: RUF012
    # With dtype=bfloat16 only the VLM is bfloat16; all other weights stay float32, for training.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "dit",
        "embed_action_time",
        "action_out_proj",
        "condition",
    ]

    def __init__(self, config: Pi0CFGRLConfig) -> None:
        super().__init__(config)
        mode = getattr(config, "condition_mode", "token")  # a plain PI0Config will do
        self.condition = OptimalityCondition(mode, self.expert_hidden_size)
        self.checkpointing = False

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: tensors have the names of transformers' PI0, so its conversion of the hub's
        names, which skips custom code, must apply when loading and when saving."""
        return False

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Return the trained weights' dtype, for config.json; a frozen VLM may be bfloat16."""
        return self.action_out_proj.weight.dtype

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OptimalityCondition):
            module.reset_parameters()

    def cast_vlm(self, dtype: torch.dtype) -> None:
        """Convert the VLM's parameters; the rotary embeddings' buffers must stay float32."""
        for parameter in self.model.vlm.parameters():
            parameter.data = parameter.data.to(dtype)

    def drop_unused_embeddings(self) -> None:
        """Free the expert's unused token embeddings, 263 M parameters at full size."""
        self.model.dit.embed_tokens = None

    def checkpoint_layers(self) -> None:
        """Turn on gradient checkpointing: keep only each layer's input and recompute the rest.

        transformers' own gradient checkpointing drops the KV cache that holds the prefix, so it is
        used for the vision tower only.
        """
        self.checkpointing = True
        tower: Any = self.model.vlm.vision_tower
        tower._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))

    def fsdp_units(self) -> list[nn.Module]:
        """Return the token embeddings, the vision tower's layers, and the MLPs of all others, whose
        attention isn't called as a module: see `FlowPolicy.fsdp_units`."""
        layers = [m for m in self.modules() if isinstance(m, SiglipEncoderLayer | GemmaMLP)]
        return [self.model.vlm.get_input_embeddings(), *layers]

    # The prefix -------------------------------------------------------------------------------

    def encode_prefix(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        pixel_attention_mask: Tensor | None,
        attention_mask: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Prefix:
        """Run the VLM on images and language, once for all denoising steps and branches.

        :param input_ids: int64 (batch, tokens)
        :param pixel_values: float (batch, cameras, 3, size, size) in [-1, 1]
        :param pixel_attention_mask: bool (batch, cameras)
        :param attention_mask: int64 (batch, tokens), 1 for real tokens
        :param inputs_embeds: float (batch, tokens, hidden) in place of the first three
        """
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_prefix(input_ids, pixel_values, pixel_attention_mask)
        return run_prefix(
            self.model.vlm.language_model,
            inputs_embeds,
            attention_mask,
            self.checkpointing and torch.is_grad_enabled(),
        )

    def embed_images(
        self, input_ids: Tensor, pixel_values: Tensor, pixel_attention_mask: Tensor
    ) -> Tensor:
        """Embed the images, to be used with several texts: see `embed_after`.

        :param input_ids: the prefix's first tokens, which are all images', int64 (batch, tokens)
        :return: (batch, tokens, hidden)
        """
        embeds: Tensor = self.model.embed_prefix(input_ids, pixel_values, pixel_attention_mask)
        return embeds

    def embed_after(self, image_embeds: Tensor, text_ids: Tensor) -> Tensor:
        """Return the embedded prefix of these images and a text, as one pass over both gives it."""
        embed: Any = self.model.vlm.get_input_embeddings()
        return torch.cat([image_embeds, embed(text_ids)], dim=1)

    # The velocity -----------------------------------------------------------------------------

    def forward(  # type: ignore[override]
        self,
        state: Tensor,
        noise: Tensor | None = None,
        timestep: Tensor | None = None,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        actions: Tensor | None = None,
        is_positive: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the velocity (as `logits`) and, given `actions`, the flow-matching loss.

        :param state: (batch, max_state_dim), normalised and zero-padded
        :param noise: (batch, chunk_size, max_action_dim): the noise when `actions` are given,
            else x_t itself; None draws it
        :param timestep: (batch,); None draws it
        :param cache: `Prefix.to_cache()`, or what transformers' VLM gave; the VLM isn't run then.
            Pass the prefix's attention_mask with it. Where all labels are ∅, transformers lengthens
            it. `past_key_values`, its name before transformers 5.24, is taken as well
        :param is_positive: None (∅), 0, 1, or int (batch,) with -1 for ∅
        The other arguments are transformers'; those that aren't named here are only passed to its
        own forward, which runs if all labels are ∅.
        :raises ValueError: a label is not ∅, and attention_mask is missing, position_ids is given,
            or the condition is in the text
        """
        earlier = kwargs.pop("past_key_values", None)  # as an earlier transformers' sampler does
        cache = earlier if cache is None else cache
        labels = as_labels(is_positive, state.shape[0], state.device)
        if bool((labels == NULL).all()):
            kwargs[CACHE] = cache
            output: CausalLMOutputWithPast = super().forward(
                state=state,
                noise=noise,
                timestep=timestep,
                input_ids=input_ids,
                pixel_values=pixel_values,
                pixel_attention_mask=pixel_attention_mask,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                actions=actions,
                **kwargs,
            )
            return output
        if self.condition.mode == "text":
            raise ValueError(
                "with condition_mode='text' is_positive must be None: the condition is words in "
                "the prompt, so put them into input_ids, or let Pi0Policy do that"
            )
        if attention_mask is None or position_ids is not None:
            raise ValueError(
                "with is_positive, pass attention_mask (int64 (batch, tokens), 1 for real tokens) "
                "and no position_ids: they follow from it"
            )
        if timestep is None:
            timestep = sample_time(state.shape[0], None, state.device)
        if noise is None:
            shape = (state.shape[0], self.config.chunk_size, self.config.max_action_dim)
            noise = sample_noise(shape, None, state.device).to(state.dtype)
        x_t = noise if actions is None else interpolate(actions, noise, timestep).to(actions.dtype)
        if cache is None:
            prefix = self.encode_prefix(
                input_ids, pixel_values, pixel_attention_mask, attention_mask, inputs_embeds
            )
        else:
            prefix = Prefix.from_cache(cache, attention_mask)
        velocity = self.velocity(prefix, state, x_t, timestep, labels)
        loss = None
        if actions is not None:
            loss = F.mse_loss(noise - actions, velocity, reduction=self.config.loss_reduction)
        return CausalLMOutputWithPast(loss=loss, logits=velocity)

    def velocity(
        self, prefix: Prefix, state: Tensor, x_t: Tensor, timestep: Tensor, labels: Tensor
    ) -> Tensor:
        """Compute the velocity of each row under its label, (batch, chunk_size, max_action_dim).

        :param labels: int64 (batch,) in {-1, 0, 1}, -1 for ∅
        """
        state_token, tokens = self._embed_suffix(state, x_t, timestep, labels)
        conditioned = labels != NULL if self.condition.mode == "token" else None
        (velocity,) = self._run_expert(prefix, state_token, [(tokens, conditioned)])
        return velocity

    def branch_velocities(
        self,
        prefix: Prefix,
        state: Tensor,
        x_t: Tensor,
        timestep: Tensor,
        branches: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        """Compute the velocities of the same rows under several labels, in one expert pass.

        The branches' action tokens follow one shared state token and don't attend to each other's;
        prefix and weights are read once for all branches.

        :param branches: labels in {-1, 0, 1}, -1 for ∅
        """
        blocks = []
        for label in branches:
            labels = torch.full((state.shape[0],), label, device=state.device)
            state_token, tokens = self._embed_suffix(state, x_t, timestep, labels)
            conditioned = labels != NULL if self.condition.mode == "token" else None
            if conditioned is not None and label == NULL:
                tokens, conditioned = tokens[:, 1:], None
            blocks.append((tokens, conditioned))
        return tuple(self._run_expert(prefix, state_token, blocks))

    def _embed_suffix(
        self, state: Tensor, x_t: Tensor, timestep: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the state token (batch, 1, hidden) and the tokens after it (batch, n, hidden): the
        actions, in "token" mode preceded by the condition."""
        if self.condition.mode == "text":  # the prefix has it
            embeds = self.embed_action_time(state, x_t, timestep)
            return embeds[:, :1], embeds[:, 1:]
        injected = self.condition(labels)[:, None]  # (batch, 1, hidden)
        if self.condition.mode == "concat":
            embeds = self._embed_action_time_concat(state, x_t, timestep, injected)
        else:
            embeds = self.embed_action_time(state, x_t, timestep)  # [state, actions...]
        state_token, actions = embeds[:, :1], embeds[:, 1:]
        if self.condition.mode == "bias":
            actions = actions + injected.to(embeds.dtype)
        elif self.condition.mode == "token":
            actions = torch.cat([state_token + injected.to(embeds.dtype), actions], dim=1)
        return state_token, actions

    def _embed_action_time_concat(
        self, state: Tensor, x_t: Tensor, timestep: Tensor, injected: Tensor
    ) -> Tensor:
        """Run transformers' PI0ActionTimeEmbedding.forward with a wider input to layer one."""
        embed = self.embed_action_time
        action = embed.action_in_proj(x_t)  # (batch, chunk, hidden)
        time = embed.sinusoid_embeds(timestep)[:, None, :].expand_as(action).to(action.dtype)
        hidden = embed.action_time_mlp_in(torch.cat([action, time], dim=2))
        hidden = hidden + injected.to(hidden.dtype)
        action_time = embed.action_time_mlp_out(F.silu(hidden))
        return torch.cat([embed.state_proj(state)[:, None], action_time], dim=1)

    def _run_expert(self, prefix: Prefix, state_token: Tensor, blocks: list[Block]) -> list[Tensor]:
        """Run transformers' suffix pass over a state token and the blocks of tokens after it.

        :param blocks: each attends to the prefix, the state token and itself
        :return: the velocity of each block, (batch, chunk_size, max_action_dim)
        """
        dit: Any = self.model.dit
        hidden = torch.cat([state_token, *(tokens for tokens, _ in blocks)], dim=1)
        ends = [tokens.shape[1] for tokens, _ in blocks]
        # The actions' positions follow the state's; a condition has the same position as the state.
        after = torch.arange(self.config.chunk_size + 1, device=hidden.device)
        steps = torch.cat([after[:1], *(after[-n:] for n in ends)])
        position_ids = prefix.attention_mask.sum(1, keepdim=True) + steps  # (batch, tokens)
        rotary = dit.rotary_emb(hidden, position_ids=position_ids)

        weights = _suffix_weights(prefix.attention_mask, blocks, hidden.dtype)
        bias = _attention_bias(weights, dit.config)
        checkpointing = self.checkpointing and torch.is_grad_enabled()
        step = partial(checkpoint, _run_layer, use_reentrant=False) if checkpointing else _run_layer
        for index, layer in enumerate(dit.layers):
            hidden = step(layer, hidden, rotary, bias, prefix.keys_values[:, index])
        hidden = dit.norm(hidden)[:, 1:]
        return [
            self.action_out_proj(block[:, -self.config.chunk_size :])
            for block in hidden.split(ends, dim=1)
        ]


def _suffix_weights(prefix_mask: Tensor, blocks: list[Block], dtype: torch.dtype) -> Tensor:
    """Return the weight of each key for each suffix token, (batch, suffix, prefix + suffix).

    It is 0 or 1 as in transformers' PI0Model.forward: the state attends to the prefix and itself,
    the actions to everything before them. If there is a condition, state and condition have weight
    1/2 each, so that the softmax is that of the state alone as long as the two are equal.
    """
    length = 1 + sum(tokens.shape[1] for tokens, _ in blocks)
    suffix = torch.zeros(len(prefix_mask), length, length, dtype=dtype, device=prefix_mask.device)
    suffix[:, :, 0] = 1
    start = 1
    for tokens, conditioned in blocks:
        end = start + tokens.shape[1]
        suffix[:, start:end, start:end] = 1
        if conditioned is not None:
            half = conditioned[:, None].to(dtype) / 2  # (batch, 1), 0 for ∅
            suffix[:, start, start + 1 : end] = 0  # like the state, it doesn't attend to actions
            suffix[:, start:end, start] = half
            suffix[:, start:end, 0] = 1 - half
        start = end
    prefix = prefix_mask.to(dtype)[:, None].expand(-1, length, -1)
    return torch.cat([prefix, suffix], dim=2)


def _attention_bias(weights: Tensor, config: Any) -> Tensor:
    """Return what `_run_layer` adds to the logits, (batch, 1, heads_per_key · tokens, keys).

    :param weights: the weight of each key for each token, (batch, tokens, keys)
    """
    groups = config.num_attention_heads // config.num_key_value_heads
    return weights.log().repeat(1, groups, 1)[:, None]


def _run_layer(
    layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor, prefix: Tensor
) -> Tensor:
    """Run transformers' GemmaDecoderLayer.forward over a prefix, as one attention for all heads.

    transformers' attention passes PI0's one key-value head to the kernel eight times, so that the
    backward pass has to sum eight gradients of the prefix. Here the queries of all heads that share
    a key-value head are concatenated instead.

    :param hidden: (batch, tokens, width)
    :param rotary: cosine and sine, (batch, tokens, head_dim)
    :param bias: see `_attention_bias`
    :param prefix: (batch, 2, kv_heads, prefix tokens, head_dim), keys and values
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    queries, keys, values = (
        projection(normed).view(shape).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
    before = prefix.to(values.dtype)
    keys = torch.cat([before[:, 0], keys.to(values.dtype)], dim=2)
    values = torch.cat([before[:, 1], values], dim=2)
    kv_heads, tokens = keys.shape[1], hidden.shape[1]
    grouped = queries.to(values.dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    attended = F.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=bias.to(values.dtype), scale=attention.scaling
    )
    attended = attended.unflatten(2, (-1, tokens)).flatten(1, 2).transpose(1, 2).flatten(2)
    hidden = hidden + attention.o_proj(attended)
    output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return output
