"""Chats: one form of messages, and their rendering by a template that may be hostile."""

from swaa_jax.chats.messages import ChatError, Message, Tools, normal_messages, normal_tools
from swaa_jax.chats.rendering import FLAGS, TEMPLATE_DATE, Rendered, render_chat, unused_variables

__all__ = [
    "FLAGS",
    "TEMPLATE_DATE",
    "ChatError",
    "Message",
    "Rendered",
    "Tools",
    "normal_messages",
    "normal_tools",
    "render_chat",
    "unused_variables",
]
