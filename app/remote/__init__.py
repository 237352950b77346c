"""Another OpenAI-compatible server that answers a conversation in place of the engine here.

Nothing is sent anywhere before a person has named a server on the settings page and chosen one of its models in a
conversation. What comes back is read as a stranger's: within limits of size and time, as text, without its redirects.
"""
