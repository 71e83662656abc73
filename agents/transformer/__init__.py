"""Our own agent: a decoder-only multimodal transformer policy, trained by reinforcement learning.

Read in the order ``actions.py`` (what a policy does), ``episodes.py`` (what it reads), ``model.py`` (the transformer),
``rollout.py`` (playing), ``ppo.py`` (learning), ``agent.py`` (the agent around them).
"""
