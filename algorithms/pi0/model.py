"""transformers' PI0 with an optimality condition o ∈ {∅, 0, 1}, and nothing else added."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PI0ForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from cfgrl_gym.algorithms.flow import NULL, interpolate, sample_noise, sample_time
from cfgrl_gym.algorithms.pi0.condition import OptimalityCondition, Pi0CFGRLConfig, as_labels
from cfgrl_gym.algorithms.pi0.prefix import Prefix


class Pi0ForCFGRL(PI0ForConditionalGeneration):
    """PI0 whose velocity may be conditioned on optimality.

    `forward` takes transformers' own arguments plus `is_positive`: None (∅), 0, 1, or an integer
    tensor (batch,) with -1 for ∅. A batch that is ∅ throughout runs transformers' own forward,
    untouched. In a mixed batch every row gets what it would get alone (to rounding):

    - "token": the suffix becomes [state, condition, actions...]. For the block mask the condition
      stands in the actions' block: it and the actions see each other and everything before them,
      and the state token still sees the prefix and itself only. A ∅ row has the token masked out
      and not counted in the positions, so its action tokens sit where they would without it.
    - "bias": the embedding is added to every action token.
    - "concat": the embedding is concatenated into the input of `action_time_mlp_in`.

    transformers' part of the state dict keeps transformers' names; the condition's parameters are
    `condition.*`, and are initialised afresh when a checkpoint has none.
    """

    config_class = Pi0CFGRLConfig
    # dit.embed_tokens is never read (the expert takes embeddings): see `drop_unused_embeddings`.
    _keys_to_ignore_on_load_missing = [r"dit\.embed_tokens"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"dit\.embed_tokens"]  # noqa: RUF012

    def __init__(self, config: Pi0CFGRLConfig) -> None:
        super().__init__(config)
        mode = getattr(config, "condition_mode", "token")  # a plain PI0Config will do
        self.condition = OptimalityCondition(mode, self.expert_hidden_size)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OptimalityCondition):
            module.reset_parameters()

    def drop_unused_embeddings(self) -> None:
        """Free the expert's token embeddings: 263 M parameters at full size that nothing reads."""
        self.model.dit.embed_tokens = None

    # The prefix -------------------------------------------------------------------------------

    def encode_prefix(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor,
        attention_mask: Tensor,
    ) -> Prefix:
        """Run the VLM on images and language once.

        :param input_ids: int64 (batch, tokens)
        :param pixel_values: float (batch, cameras, 3, size, size) in [-1, 1]
        :param pixel_attention_mask: bool (batch, cameras)
        :param attention_mask: int64 (batch, tokens), 1 for real tokens
        """
        cache = self._prefix_cache(
            input_ids, pixel_values, pixel_attention_mask, attention_mask, None, None
        )
        return Prefix(cache, attention_mask)

    def _prefix_cache(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        pixel_attention_mask: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Any:
        # As in transformers' PI0Model.forward.
        if attention_mask is not None and position_ids is None:
            position_ids = attention_mask.cumsum(-1) - 1
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_prefix(input_ids, pixel_values, pixel_attention_mask)
        return self.model.vlm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=torch.zeros_like(inputs_embeds)[:, :, 0],
            use_cache=True,
        ).past_key_values

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
        past_key_values: Cache | None = None,
        actions: Tensor | None = None,
        is_positive: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Velocity (as `logits`) and, given `actions`, the flow-matching loss.

        :param state: (batch, max_state_dim), normalised and zero-padded
        :param noise: (batch, chunk_size, max_action_dim): the noise when `actions` are given,
            else x_t itself; None draws it
        :param timestep: (batch,); None draws it
        :param past_key_values: a fork of a prefix's cache (it grows); the VLM isn't run then.
            Pass the prefix's attention_mask with it.
        :param is_positive: None (∅), 0, 1, or int (batch,) with -1 for ∅
        The other arguments are transformers'.
        """
        labels = as_labels(is_positive, state.shape[0], state.device)
        if bool((labels == NULL).all()):
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
                past_key_values=past_key_values,
                actions=actions,
                **kwargs,
            )
            return output
        if timestep is None:
            timestep = sample_time(state.shape[0], None, state.device)
        if noise is None:
            shape = (state.shape[0], self.config.chunk_size, self.config.max_action_dim)
            noise = sample_noise(shape, None, state.device).to(state.dtype)
        x_t = noise if actions is None else interpolate(actions, noise, timestep).to(actions.dtype)
        if past_key_values is None:
            past_key_values = self._prefix_cache(
                input_ids,
                pixel_values,
                pixel_attention_mask,
                attention_mask,
                position_ids,
                inputs_embeds,
            )
        embeds, present = self._embed_suffix(state, x_t, timestep, labels)
        expert = self._run_expert(embeds, present, attention_mask, past_key_values, **kwargs)
        velocity = self.action_out_proj(expert.last_hidden_state[:, -self.config.chunk_size :])
        loss = None
        if actions is not None:
            loss = F.mse_loss(noise - actions, velocity, reduction=self.config.loss_reduction)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=velocity,
            past_key_values=expert.past_key_values,
            hidden_states=expert.hidden_states,
            attentions=expert.attentions,
        )

    def _embed_suffix(
        self, state: Tensor, x_t: Tensor, timestep: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Suffix embeddings (batch, suffix, hidden); which of them exist, int64 (batch, suffix)."""
        injected = self.condition(labels)  # (batch, hidden)
        if self.condition.mode == "concat":
            embeds = self._embed_action_time_concat(state, x_t, timestep, injected)
        else:
            embeds = self.embed_action_time(state, x_t, timestep)  # [state, actions...]
        state_token, action_tokens = embeds[:, :1], embeds[:, 1:]
        if self.condition.mode == "bias":
            bias = injected[:, None].to(embeds.dtype)
            embeds = torch.cat([state_token, action_tokens + bias], dim=1)
        elif self.condition.mode == "token":
            token = injected[:, None].to(embeds.dtype)
            embeds = torch.cat([state_token, token, action_tokens], dim=1)
        present = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        if self.condition.mode == "token":
            present[:, 1] = (labels != NULL).long()
        return embeds, present

    def _embed_action_time_concat(
        self, state: Tensor, x_t: Tensor, timestep: Tensor, injected: Tensor
    ) -> Tensor:
        """transformers' PI0ActionTimeEmbedding.forward with a wider input to its first layer."""
        embed = self.embed_action_time
        action = embed.action_in_proj(x_t)  # (batch, chunk, hidden)
        time = embed.sinusoid_embeds(timestep)[:, None, :].expand_as(action).to(action.dtype)
        hidden = embed.action_time_mlp_in(torch.cat([action, time], dim=2))
        hidden = hidden + injected[:, None].to(hidden.dtype)
        action_time = embed.action_time_mlp_out(F.silu(hidden))
        return torch.cat([embed.state_proj(state)[:, None], action_time], dim=1)

    def _run_expert(
        self,
        embeds: Tensor,
        present: Tensor,
        prefix_mask: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' suffix pass, with suffix tokens that may be absent in some rows."""
        batch, prefix_length = embeds.shape[0], past_key_values.get_seq_length()
        if prefix_mask is None:
            prefix_mask = torch.ones(batch, prefix_length, dtype=torch.int64, device=embeds.device)
        mask = torch.cat([prefix_mask.to(present.dtype), present], dim=1)
        # An absent token isn't counted, so the tokens after it keep their positions.
        position_ids = (mask.cumsum(dim=1) - 1)[:, -embeds.shape[1] :]
        # Block 0: prefix and state. Block 1: condition token, if any, and actions.
        blocks = torch.ones(prefix_length + embeds.shape[1], dtype=torch.int64, device=mask.device)
        blocks[: prefix_length + 1] = 0
        block_mask = create_causal_mask(
            config=self.config.dit_config,  # type: ignore[arg-type]
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=past_key_values,
            block_sequence_ids=blocks[None].expand(batch, -1),
        )
        return self.model.dit(
            inputs_embeds=embeds,
            attention_mask=block_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
