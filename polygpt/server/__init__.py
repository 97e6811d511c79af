"""An OpenAI-compatible HTTP API over the engine, and the page that shows what a model does."""

from polygpt.server.app import create_app
from polygpt.server.launch import address_of, listen, serve
from polygpt.server.served import Served
from polygpt.server.settings import ServerSettings

__all__ = ["Served", "ServerSettings", "address_of", "create_app", "listen", "serve"]
