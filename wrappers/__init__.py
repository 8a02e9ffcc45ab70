"""Provides wrappers between LIBERO and a policy; only the observation wrapper requires LIBERO."""

from cfgrl_gym.wrappers.action_chunk import ActionChunk
from cfgrl_gym.wrappers.libero_observation import TwoTestObservation
from cfgrl_gym.wrappers.prompt import decode_prompt, encode_prompt

__all__ = ["ActionChunk", "TwoTestObservation", "decode_prompt", "encode_prompt"]
