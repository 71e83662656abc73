"""Our own agent: a decoder-only multimodal transformer policy, trained by reinforcement learning.

Read in the order ``actions.py`` (what a policy does), ``episodes.py`` (what it reads), ``block.py`` and ``model.py`` (the transformer),
``rollout.py`` (playing), ``learning.py`` and ``ppo.py`` (learning), ``grpo.py``, ``dpo.py``, ``supervised.py`` (other ways to
learn), ``restraints.py`` (what holds it down), ``settings.py`` (what it is made of), ``agent.py`` (the agent around them).
"""
