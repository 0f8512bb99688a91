package relay

import (
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// The more messages are parked for a suspect, the less often each of them is read
// again: a million would leave others no time.
func TestMessagesOfASuspectAreReadAgainAtABoundedRate(t *testing.T) {
	t.Parallel()
	s := newSuspects()
	m := newMessage(1, "", "q")
	s.accuse(placesOf(m)[1], m, "silent")
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
	if cleared := s.takeCleared(); len(cleared) != 1 || cleared[0].place != placesOf(m)[1] {
		t.Errorf("cleared: %v", cleared)
	}
}

// A message is parked for a suspect at the very moment at which that takes messages
// again: it is read at once all the same.
func TestMessageThatWasJustParkedIsRecalled(t *testing.T) {
	t.Parallel()
	db, ctx := testenv.Schema(t), testenv.Context(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		return outbox.Writer{Schema: db.Schema}.Write(ctx, tx, outbox.Message{RoutingKey: "q"})
	}))
	r := newRelay(t, db.Pool, db.Schema)
	must(r.leases.once(ctx, true))
	for range 2 { // first from outbox, then from outbox_parked
		_, err := r.reader.once(ctx)
		must(err)
		taken := r.hand.take(1)
		if len(taken) != 1 {
			t.Fatal("the message was not read")
		}
		r.hand.refuse(verdict{message: taken[0], reason: "retry", delay: suspectDelay - time.Minute})
		_, refused := r.hand.toSettle(1)
		must(r.settler.park(ctx, refused))
		r.suspects.cleared = []recalled{{placesOf(taken[0])[1], time.Now()}}
	}
	_, err := r.reader.once(ctx)
	must(err)
	if len(r.hand.take(1)) != 1 {
		t.Error("it waits for its time")
	}
}
