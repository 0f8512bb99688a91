package relay

import (
	"fmt"
	"testing"
	"time"
)

// The more messages are parked for a suspect, the less often each of them is read
// again: a million would leave others no time.
func TestMessagesOfASuspectAreReadAgainAtABoundedRate(t *testing.T) {
	t.Parallel()
	s := newSuspects()
	m := newMessage(1, "", "q")
	s.accuse(m, silent, "silent")
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
	s.accuse(newMessage(3, "", "q"), missing, "missing")
	s.admit(probe)
	if !probe.alone {
		t.Fatal("no probe was chosen")
	}
	s.accuse(probe, silent, "silent")
	s.byPlace[exchangeOf(probe)].next = time.Time{}
	if s.admit(next); !next.alone {
		t.Error("the exchange has no other probe")
	}
}

// A message that failed as the probe of its destination is tried apart when others have
// had their answer; the destination is suspect no more.
func TestProbeThatFailsAloneIsSuspectItself(t *testing.T) {
	t.Parallel()
	s := newSuspects()
	stuck, other := newMessage(1, "", "q"), newMessage(2, "", "q")
	stuck.onTrial, stuck.parked, other.parked = true, true, true
	if _, own := s.accuse(stuck, silent, "silent"); own {
		t.Error("the destination is not suspect")
	}
	s.byPlace[placeOf(stuck)].next = time.Time{}
	if s.admit(other) || !other.alone {
		t.Fatal("the other is not the probe")
	}
	s.clear(other)
	if !s.admit(newMessage(3, "", "q")) {
		t.Error("the destination is suspect still")
	}
	for range 3 {
		stuck.onTrial, stuck.alone = false, false
		if s.admit(stuck) || !stuck.alone {
			t.Fatal("it is not tried alone")
		}
		if _, own := s.accuse(stuck, silent, "silent"); !own || !s.admit(newMessage(3, "", "q")) {
			t.Error("the destination is suspect again")
		}
		s.byPlace[itself(stuck)].next = time.Time{}
	}
	s.clear(stuck)
	if !s.admit(stuck) || s.count.Load() != 0 {
		t.Errorf("suspect still: %v", s.byPlace)
	}
}

// What is remembered has a bound; single messages are forgotten first.
func TestSuspectsHaveABound(t *testing.T) {
	t.Parallel()
	s := newSuspects()
	for id := range int64(3 * maxSuspects) {
		s.accuse(newMessage(id+1, "", "q"), silent, "silent")
	}
	if s.byPlace[placeOf(newMessage(1, "", "q"))] == nil || len(s.byPlace) != maxSuspects || s.count.Load() != maxSuspects {
		t.Errorf("%d places", len(s.byPlace))
	}
}

func TestSlowDestinationsAreForgottenAfterAWhile(t *testing.T) {
	t.Parallel()
	s := newSlow()
	for i := range maxSlow + 1 {
		s.answered(destination{fmt.Sprint(i), ""}, 2*time.Second)
	}
	d := destination{fmt.Sprint(maxSlow), ""}
	s.answered(d, time.Second) // too soon to count
	s.answered(d, 1600*time.Millisecond)
	if got := s.patience(d); got != 4*time.Second || len(s.byDestination) != maxSlow || s.count.Load() != maxSlow {
		t.Errorf("patience %s; %d are known", got, len(s.byDestination))
	}
	s.byDestination[d] = slowness{2 * time.Second, since() - int64(slowFor) - 1}
	if got := s.patience(d); got != 0 || s.count.Load() != maxSlow-1 {
		t.Errorf("patience %s after a while", got)
	}
}

// A probe that the broker answers at once, if only with an exception, does not queue behind
// those that wait for queues that do not answer.
func TestProbesOfSilentPlacesKeepNoOthersWaiting(t *testing.T) {
	t.Parallel()
	s := newSuspects()
	quick, slow := newMessage(1, "", "quick"), newMessage(2, "", "slow")
	quick.exchange = "absent"
	s.accuse(quick, missing, `Exception (404) Reason: "NOT_FOUND - no exchange 'absent' in vhost '/'"`)
	s.accuse(slow, silent, notAnswering)
	h := newHand()
	for _, m := range []*message{slow, quick} {
		m.parked = true
		for _, x := range s.byPlace {
			x.next = time.Time{}
		}
		if s.admit(m) || !m.alone {
			t.Fatalf("%s: it is no probe", m.routingKey)
		}
		h.pushAlone(m)
	}
	if first := h.takeAlone(true); len(first) != 1 || first[0] != quick {
		t.Errorf("first comes %v", first)
	}
	if s.clear(quick) || !s.clear(slow) {
		t.Error("it does not tell which place was silent")
	}
}
