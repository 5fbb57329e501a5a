"""A world model driven by a person, one action row at a time: the rollout, the session, and the page that serves it."""
