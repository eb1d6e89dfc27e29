"""The whole campaign (tests/fault_campaign.py): hours on a busy machine, 10 minutes a kind on a quiet one."""

import pytest

from tests.fault_campaign import KINDS, Campaign


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_kills(kind, tmp_path):
    outcome = Campaign(kind, tmp_path, commands=5, seed=0).run(kills=50)
    assert outcome.kills == 50 and not outcome.faults
    assert outcome.within_saves >= 5 and outcome.resumed_within_epochs >= 1
    assert outcome.runs >= 1 and outcome.equal == outcome.runs
