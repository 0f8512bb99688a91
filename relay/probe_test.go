package relay

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/testenv"
)

// Messages whose lane has been lost are dropped by whoever would probe with them. The
// next one is tried all the same.
func TestProbingGoesOnAfterLanesWereLost(t *testing.T) {
	t.Parallel()
	db := testenv.Schema(t)
	r := newRelay(t, db.Pool, db.Schema)
	ctx, cancel := context.WithCancel(testenv.Context(t))
	if err := r.leases.once(ctx, true); err != nil {
		t.Fatal(err)
	}
	var all []*message
	for id := range int64(5) {
		m := newMessage(id+1, "", testenv.Name(t))
		m.alone = true
		if id == 4 {
			m.epoch = r.leases.owned()[0]
		}
		all = append(all, m)
	}
	r.hand.admit(all)
	r.hand.retryAll(r.hand.take(len(all)))
	var probing sync.WaitGroup
	probing.Go(func() { r.probe(ctx, ctx, false) })
	defer probing.Wait()
	defer cancel()
	testenv.Eventually(t, 10*time.Second, "the last has been tried: there is no such queue", func() bool {
		return r.Stats().Refused == 1
	})
}

// What may have closed a channel, and what is on trial, waits for no probe of a silent
// queue; some of those who probe take nothing else.
func TestTrialsGoBeforeProbes(t *testing.T) {
	t.Parallel()
	h := newHand()
	var all []*message
	for id := range int64(4) {
		all = append(all, newMessage(id+1, "", "q"))
	}
	h.admit(all)
	h.take(len(all))
	all[0].patience, all[1].patience, all[3].patience = time.Second, time.Second, time.Second
	all[3].onTrial = true
	for _, m := range all {
		m.alone = true
		h.retry(m)
	}
	for i, want := range []struct {
		trialsOnly bool
		id         int64
	}{{true, 3}, {false, 4}, {true, 0}, {false, 1}, {false, 2}, {false, 0}} {
		wasNotified := len(h.probes.some) == 1
		got := int64(0)
		for _, m := range h.takeAlone(want.trialsOnly) {
			got = m.id
		}
		if got != want.id {
			t.Fatalf("%d: took %d, not %d", i, got, want.id)
		}
		if i < 4 && !wasNotified {
			t.Errorf("%d: nobody is told of the probes", i)
		}
	}
}

// What is published apart and waits for its next try does not keep its lane from being
// read again when that was lost.
func TestIsolatedMessageOfALostLaneIsDropped(t *testing.T) {
	t.Parallel()
	db := testenv.Schema(t)
	r := newRelay(t, db.Pool, db.Schema)
	ctx, cancel := context.WithCancel(testenv.Context(t))
	m := newMessage(1, "", testenv.Name(t))
	m.epoch = 1
	r.hand.admit([]*message{m})
	r.hand.apart(r.hand.take(1))
	r.isolation.add(group{messages: []*message{m}, after: time.Now().Add(time.Hour)})
	var isolating sync.WaitGroup
	isolating.Go(func() { r.isolate(ctx, ctx) })
	defer isolating.Wait()
	defer cancel()
	testenv.Eventually(t, 10*time.Second, "it is dropped", func() bool { return r.hand.empty(int(m.lane)) })
	if all := r.isolation.clear(); len(all) != 0 {
		t.Errorf("%d messages are left", len(all))
	}
}
