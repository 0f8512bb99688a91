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
