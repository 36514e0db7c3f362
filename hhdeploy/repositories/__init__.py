"""Bundles as models of other servers' repositories: Triton's, OpenVINO Model Server's."""
