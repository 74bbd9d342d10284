"""Configs of other tools, translated into arguments of this one."""
