"""The command line: a folder for each group of verbs, a module for each verb."""
