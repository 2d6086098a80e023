"""Chats: one form of messages, and their rendering by a template that may be hostile."""

from swaa_jax.chats.messages import ChatError, Message, Tools, normal_messages, normal_tools
from swaa_jax.chats.rendering import (
    FLAGS,
    TEMPLATE_DATE,
    Rendered,
    render_chat,
    unused_variables,
    warn_of_unread,
)
from swaa_jax.chats.thoughts import (
    CLOSING,
    LONGEST_MARKER,
    OPENING,
    THOUGHT_MARKERS,
    ends_in_thought,
)

__all__ = [
    "CLOSING",
    "FLAGS",
    "LONGEST_MARKER",
    "OPENING",
    "TEMPLATE_DATE",
    "THOUGHT_MARKERS",
    "ChatError",
    "Message",
    "Rendered",
    "Tools",
    "ends_in_thought",
    "normal_messages",
    "normal_tools",
    "render_chat",
    "unused_variables",
    "warn_of_unread",
]
