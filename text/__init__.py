"""Text and chats on their way to tokens and back. data.py and sample.py are the commands."""
