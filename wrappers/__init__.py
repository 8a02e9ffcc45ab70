"""Wrappers between LIBERO and a policy; all but the observation wrapper fit any environment."""

from cfgrl_gym.wrappers.action_chunk import ActionChunk
from cfgrl_gym.wrappers.prompt import decode_prompt, encode_prompt
from cfgrl_gym.wrappers.two_test import TwoTestObservation

__all__ = ["ActionChunk", "TwoTestObservation", "decode_prompt", "encode_prompt"]
