"""The build machine: trace, fold, side branches, precision, engines, writing."""
