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
