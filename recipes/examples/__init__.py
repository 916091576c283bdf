"""Steps and models of one's own, each in one file: docs/steps.md leads through one."""
