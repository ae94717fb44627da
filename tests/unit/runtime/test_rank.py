"""A rank's turn: what it takes in before it does anything else is bounded."""

from __future__ import annotations

from lepton_dist.comm.world import World, run_local
from lepton_dist.runtime.messages import Dropped, Message, Shutdown
from lepton_dist.runtime.rank import Rank


def test_messages_without_end_keep_no_rank_in_one_turn() -> None:
    """Each message brings another: a storm that fills the mailbox as fast as it is emptied."""

    def body(world: World) -> int:
        taken: list[Message] = []

        def again(message: Message) -> None:
            taken.append(message)
            assert len(taken) < 10_000, "the turn does not end"
            rank.send(0, message)

        rank = Rank(world, again)
        rank.send(0, Dropped(0, []))
        for turn in range(1, 4):
            assert rank.advance(), "it was busy"
            assert len(taken) <= 256 * turn
        rank.send(0, Shutdown(5))  # behind the storm's present message, and still taken
        rank.advance()
        assert rank.exit_code == 5
        return len(taken)

    assert run_local(1, body)[0] > 3
