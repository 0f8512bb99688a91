package relay

import (
	"bytes"
	"context"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/testenv"
)

// sharers are the leases of several relays, without the relays.
type sharers struct {
	*testing.T
	ctx context.Context
	db  *testenv.DB
	all []*leases
}

func newSharers(t *testing.T, n int) *sharers {
	t.Helper()
	s := &sharers{T: t, ctx: testenv.Context(t), db: testenv.Schema(t)}
	for range n {
		s.all = append(s.all, newRelay(t, s.db.Pool, s.db.Schema).leases)
	}
	return s
}

func (s *sharers) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// inMemory is how many lanes a relay reads and publishes.
func inMemory(l *leases) (n int) {
	for _, epoch := range l.owned() {
		if epoch != 0 {
			n++
		}
	}
	return n
}

// A relay that gave up lanes since it was to share them has them back if the other is
// gone by its next round.
func TestLanesThatWereGivenUpAreTakenBack(t *testing.T) {
	t.Parallel()
	s := newSharers(t, 2)
	a, b := s.all[0], s.all[1]
	s.must(a.once(s.ctx, true))
	s.must(b.once(s.ctx, true)) // finds nothing free, and counts
	s.must(a.once(s.ctx, true)) // releases its half
	if n := inMemory(a); n != lanes/2 {
		t.Fatalf("%d lanes with two relays, not %d", n, lanes/2)
	}
	s.must(b.retire(s.ctx))
	s.must(a.once(s.ctx, true))
	if n := inMemory(a); n != lanes {
		t.Errorf("%d lanes once the other was gone, not %d", n, lanes)
	}
}

// However relays come, go, and empty their lanes: once all is quiet each has its share,
// and what it takes for its own is its own.
func TestLanesEndUpFairlyShared(t *testing.T) {
	t.Parallel()
	s := newSharers(t, 4)
	for round := range 40 {
		for range 30 {
			l := s.all[rand.IntN(len(s.all))]
			switch rand.IntN(6) {
			case 0:
				s.must(l.retire(s.ctx))
			case 1: // something of a lane comes into the hand, or leaves it
				l.hand.unsettled[rand.IntN(lanes)] = rand.IntN(2)
			case 2:
				l.mu.Lock()
				if l.deadline != 0 { // a lease that ends, the row of which stays for a while
					l.deadline = 1
				}
				l.lapse()
				l.mu.Unlock()
			default:
				s.must(l.once(s.ctx, rand.IntN(2) == 0))
			}
		}
		// What lapsed is not live for longer than its lease.
		_, err := s.db.Exec(s.ctx, "DELETE FROM "+s.db.Table("outbox_relay"))
		s.must(err)
		for range 4 {
			for _, l := range s.all {
				l.hand.unsettled = [lanes]int{}
				s.must(l.once(s.ctx, true))
			}
		}
		for i, l := range s.all {
			var inTable int
			s.must(s.db.QueryRow(s.ctx, "SELECT count(*) FROM "+s.db.Table("outbox_lane")+" WHERE owner = $1", l.identity()).Scan(&inTable))
			if n := inMemory(l); n != lanes/len(s.all) || inTable != n {
				t.Fatalf("round %d: relay %d has %d lanes, by the table %d; not %d", round, i, n, inTable, lanes/len(s.all))
			}
		}
	}
}

// The log says when a relay owns lanes again, and not at each round.
func TestLogTellsOfLanesAfterALapse(t *testing.T) {
	t.Parallel()
	s := newSharers(t, 1)
	l, log := s.all[0], &bytes.Buffer{}
	l.log = slog.New(slog.NewTextHandler(log, nil))
	for range 2 {
		s.must(l.once(s.ctx, true))
		s.must(l.once(s.ctx, true))
		l.mu.Lock()
		l.deadline = 1 // long past
		l.lapse()
		l.mu.Unlock()
		_, err := s.db.Exec(s.ctx, "DELETE FROM "+s.db.Table("outbox_relay")) // as when its lease has run out there, too
		s.must(err)
	}
	if text := log.String(); strings.Count(text, "owns lanes") != 2 || strings.Count(text, "all lanes given up") != 2 {
		t.Errorf("log:\n%s", text)
	}
}

// A lane of which something is in the hand is given up for good when it has been drained
// for as long as a lease: its other keys do not wait for ever.
func TestLaneIsDrainedForALeaseAtMost(t *testing.T) {
	t.Parallel()
	s := newSharers(t, 2)
	a, b := s.all[0], s.all[1]
	s.must(a.once(s.ctx, true))
	for lane := range lanes {
		a.hand.unsettled[lane] = 1
	}
	s.must(b.once(s.ctx, true))
	s.must(a.once(s.ctx, true))
	s.must(b.once(s.ctx, true))
	if n := inMemory(b); n != 0 || inMemory(a) != lanes/2 {
		t.Fatalf("%d lanes were released while something of each was under way; %d are kept", n, inMemory(a))
	}
	for lane := range lanes {
		a.draining[lane].until = 1
	}
	s.must(a.once(s.ctx, true))
	s.must(b.once(s.ctx, true))
	if n := inMemory(b); n != lanes/2 {
		t.Errorf("%d lanes were released, not %d", n, lanes/2)
	}
}

// The last renewal is done before all is released.
func TestRenewalIsOverWhenTheRelayLeaves(t *testing.T) {
	t.Parallel()
	s := newSharers(t, 1)
	l := s.all[0]
	s.must(l.once(s.ctx, true))
	lock, err := s.db.Begin(s.ctx)
	s.must(err)
	defer lock.Rollback(s.ctx)
	_, err = lock.Exec(s.ctx, "SELECT FROM "+s.db.Table("outbox_relay")+" FOR UPDATE")
	s.must(err)
	ctx, stop := context.WithCancel(s.ctx)
	defer stop()
	over := make(chan struct{})
	go func() { defer close(over); l.run(ctx, s.ctx) }()
	s.untilOneWaits()
	stop()
	select {
	case <-over:
		t.Error("it was left to the server")
	case <-time.After(300 * time.Millisecond):
	}
	s.must(lock.Rollback(s.ctx))
	<-over
	s.must(l.leave(s.ctx))
	var rows int
	s.must(s.db.QueryRow(s.ctx, "SELECT count(*) FROM "+s.db.Table("outbox_relay")).Scan(&rows))
	if rows != 0 {
		t.Errorf("%d relays are live", rows)
	}
}

// untilOneWaits waits until a statement waits for the lock of a relay's row.
func (s *sharers) untilOneWaits() {
	s.Helper()
	testenv.Eventually(s.T, 10*time.Second, "a statement waits for the row", func() (waits bool) {
		s.must(s.db.QueryRow(s.ctx, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%' || $1 || '%')",
			s.db.Table("outbox_relay")).Scan(&waits))
		return waits
	})
}

// The release meets with an update of the relay's row, in a session that is serializable by
// default.
func TestLanesAreReleasedInSerializableSessions(t *testing.T) {
	t.Parallel()
	s := newSharers(t, 1)
	l := s.all[0]
	s.must(l.once(s.ctx, true))
	config := s.db.Config()
	config.ConnConfig.RuntimeParams["default_transaction_isolation"] = "serializable"
	db, err := pgxpool.NewWithConfig(s.ctx, config)
	s.must(err)
	defer db.Close()
	l.db = db
	renewal, err := s.db.Begin(s.ctx)
	s.must(err)
	defer renewal.Rollback(s.ctx)
	_, err = renewal.Exec(s.ctx, "UPDATE "+s.db.Table("outbox_relay")+" SET leased_until = leased_until + interval '1 s'")
	s.must(err)
	left := make(chan error, 1)
	go func() { left <- l.leave(s.ctx) }()
	s.untilOneWaits()
	s.must(renewal.Commit(s.ctx))
	s.must(<-left)
	var free int
	s.must(s.db.QueryRow(s.ctx, "SELECT count(*) FROM "+s.db.Table("outbox_lane")+" WHERE owner IS NULL").Scan(&free))
	if free != lanes {
		t.Errorf("%d lanes are free", free)
	}
}
