package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// leases holds what this relay owns. The state of a lane, seen from here, is its
// epoch: 0 is not ours. Readers and publishers only look; one goroutine, run,
// changes it.
type leases struct {
	db     *pgxpool.Pool
	sql    statements
	name   string
	lease  time.Duration
	hand   *hand
	log    *slog.Logger
	health *condition

	epochs   [lanes]atomic.Int64
	deadline atomic.Int64 // of the lease, by our own monotonic clock, see since
	changed  chan struct{}
	lost     atomic.Int64 // leases that ended before they were renewed

	owner    atomic.Pointer[uuid.UUID] // fresh for each process, and after each lapse
	draining [lanes]bool
}

// began is where our monotonic clock starts.
var began = time.Now()

func since() int64 { return int64(time.Since(began)) }

// round is how often the lanes are looked at; a dead relay's lanes are taken
// within this time of the end of its lease.
const round = time.Second

func newLeases(db *pgxpool.Pool, sql statements, cfg Config, h *hand, health *condition) *leases {
	l := &leases{
		db: db, sql: sql, name: cfg.Name, lease: cfg.Lease, hand: h,
		log: cfg.Logger, health: health, changed: make(chan struct{}, 1),
	}
	l.forget()
	return l
}

// mayPublish says whether a message may be written to the broker now. It is asked
// right before each write: a relay that cannot renew stops before its lease ends.
func (l *leases) mayPublish(m *message) bool {
	return l.epochs[m.lane].Load() == m.epoch && since() < l.deadline.Load()
}

// owned returns the lanes that are ours and their epochs.
func (l *leases) owned() (ids []int16, epochs [lanes]int64) {
	ids = []int16{}
	for lane := range l.epochs {
		if epoch := l.epochs[lane].Load(); epoch != 0 {
			ids = append(ids, int16(lane))
			epochs[lane] = epoch
		}
	}
	return ids, epochs
}

// forget gives up all lanes at once, and the identity under which they were ours:
// whoever takes them now, we ourselves included, is a new owner.
func (l *leases) forget() {
	for lane := range l.epochs {
		l.epochs[lane].Store(0)
		l.draining[lane] = false
	}
	id := uuid.New()
	l.owner.Store(&id)
	l.deadline.Store(0)
}

// run keeps the lease and the fair share of lanes until ctx ends.
func (l *leases) run(ctx context.Context) {
	tick := time.NewTicker(min(round, l.lease/3))
	defer tick.Stop()
	var renewAt int64
	for {
		renew := since() >= renewAt
		err := l.once(ctx, renew)
		if ctx.Err() != nil {
			return
		}
		l.health.set(err)
		if err == nil && renew {
			renewAt = since() + int64(l.lease/3)
		}
		if err != nil {
			renewAt = 0
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// once does one round: renew, take, give up what is beyond the fair share.
func (l *leases) once(ctx context.Context, renew bool) error {
	sent := since()
	deadline := l.deadline.Load()
	if deadline != 0 && sent >= deadline {
		l.lapse()
		deadline, renew = 0, true
	}
	timeout := l.lease / 3
	if deadline != 0 {
		timeout = min(timeout, time.Duration(deadline-sent))
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	owned, share, err := l.exchange(ctx, renew)
	if err != nil {
		return fmt.Errorf("lease lanes: %w", err)
	}
	if deadline != 0 && since() >= deadline {
		l.lapse() // the answer came after the lease had ended, others may have taken over
		return nil
	}
	if renew {
		l.deadline.Store(sent + int64(l.lease))
	}
	l.adopt(owned)
	return l.giveUp(ctx, share)
}

func (l *leases) lapse() {
	l.lost.Add(1)
	l.log.Warn("lease ended before it was renewed; all lanes given up", "relay", l.name)
	l.forget()
}

func (l *leases) exchange(ctx context.Context, renew bool) (owned map[int16]int64, share int, err error) {
	batch := &pgx.Batch{}
	batch.Queue(localCommit)
	batch.Queue(l.sql.lease, *l.owner.Load(), l.name, l.lease, renew)
	results := l.db.SendBatch(ctx, batch)
	defer results.Close()
	if _, err := results.Exec(); err != nil {
		return nil, 0, err
	}
	rows, err := results.Query()
	if err != nil {
		return nil, 0, err
	}
	owned = make(map[int16]int64)
	var lane int16
	var epoch int64
	if _, err := pgx.ForEachRow(rows, []any{&lane, &epoch, &share}, func() error {
		owned[lane] = epoch
		return nil
	}); err != nil {
		return nil, 0, err
	}
	return owned, share, results.Close()
}

// adopt makes memory agree with what the database says is ours.
func (l *leases) adopt(owned map[int16]int64) {
	changed := false
	for lane := range l.epochs {
		epoch := owned[int16(lane)]
		if l.draining[lane] && epoch != 0 {
			continue
		}
		l.draining[lane] = false
		if l.epochs[lane].Swap(epoch) != epoch {
			changed = true
		}
	}
	if changed {
		notify(l.changed)
	}
}

// giveUp frees the lanes beyond our share. Publishing in them stops at once; a
// lane is released when nothing of it is under way, so that its next owner
// repeats nothing.
func (l *leases) giveUp(ctx context.Context, share int) error {
	kept := 0
	idle := []int16{}
	for lane := range l.epochs {
		if l.epochs[lane].Load() != 0 {
			if kept++; kept > share {
				l.epochs[lane].Store(0)
				l.draining[lane] = true
			}
		}
		if l.draining[lane] && l.hand.idle(int16(lane)) {
			idle = append(idle, int16(lane))
		}
	}
	if len(idle) == 0 {
		return nil
	}
	if err := l.release(ctx, idle, false); err != nil {
		return fmt.Errorf("release lanes: %w", err)
	}
	for _, lane := range idle {
		l.draining[lane] = false
	}
	return nil
}

func (l *leases) release(ctx context.Context, ids []int16, leaving bool) error {
	batch := &pgx.Batch{}
	batch.Queue(localCommit)
	batch.Queue(l.sql.release, *l.owner.Load(), ids, leaving)
	return l.db.SendBatch(ctx, batch).Close()
}

// leave frees the lanes of which nothing is under way, and says good-bye: the
// next owners start at once. The others' lease is left to run out.
func (l *leases) leave(ctx context.Context) error {
	idle := []int16{}
	for lane := range l.epochs {
		l.epochs[lane].Store(0)
		if l.hand.idle(int16(lane)) {
			idle = append(idle, int16(lane))
		}
	}
	if err := l.release(ctx, idle, len(idle) == lanes); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("release lanes: %w", err)
	}
	return nil
}
