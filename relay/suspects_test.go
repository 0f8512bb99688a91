package relay

import (
	"testing"
	"time"
)

// The more messages are parked for a suspect, the less often each of them is read
// again: a million would leave others no time.
func TestMessagesOfASuspectAreReadAgainAtABoundedRate(t *testing.T) {
	t.Parallel()
	s := newSuspects()
	m := newMessage(1, "", "q")
	s.accuse(placeOf(m), m, "silent")
	soon := 0
	for range 10_000 {
		delay, why := s.wait(m)
		if delay > suspectDelay || why != "silent" {
			t.Fatalf("waits for %s: %q", delay, why)
		}
		if delay < time.Second {
			soon++
		}
	}
	if soon > 200 {
		t.Errorf("%d of 10,000 messages are read again within a second", soon)
	}
	s.clear(m)
	if cleared := s.takeCleared(); len(cleared) != 1 || cleared[0].place != placeOf(m) {
		t.Errorf("cleared: %v", cleared)
	}
}

// A probe of an exchange that was missing finds its queue silent: the exchange has another
// probe all the same.
func TestProbeThatAccusesAnotherPlaceEnds(t *testing.T) {
	t.Parallel()
	s := newSuspects()
	probe, next := newMessage(1, "", "q"), newMessage(2, "", "q")
	probe.parked, next.parked = true, true
	s.accuse(exchangeOf(probe), newMessage(3, "", "q"), "missing")
	s.admit(probe)
	if !probe.alone {
		t.Fatal("no probe was chosen")
	}
	s.accuse(placeOf(probe), probe, "silent")
	s.byPlace[exchangeOf(probe)].next = time.Time{}
	if s.admit(next); !next.alone {
		t.Error("the exchange has no other probe")
	}
}
