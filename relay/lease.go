package relay

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/failpoint"
)

// leases holds what this relay owns. Readers and publishers look and one goroutine,
// run, renews; whoever first sees that the lease has ended gives up everything,
// so that no answer that comes later revives it.
type leases struct {
	db     *pgxpool.Pool
	sql    statements
	name   string
	lease  time.Duration
	hand   *hand
	log    *slog.Logger
	health *condition

	useless func() bool // the broker has never been there, or away for long

	changed chan struct{} // lanes came or went
	wake    chan struct{} // there may be lanes to take
	lost    atomic.Int64  // leases that ended before they were renewed

	mu       sync.RWMutex
	owner    uuid.UUID    // fresh for each process, and after each lapse
	epochs   [lanes]int64 // 0: not ours
	deadline int64        // of the lease, by our own monotonic clock; 0: none yet
	draining [lanes]drain
}

// drain is of a lane that is not published from any more, to be released.
type drain struct {
	epoch int64 // 0: it is not drained
	until int64 // it is released then, whatever of it is in the hand
}

// round is how often the lanes are looked at; a dead relay's lanes are taken
// within this time of the end of its lease.
const round = time.Second

// takeEvery is how soon lanes are taken that somebody has left.
const takeEvery = 200 * time.Millisecond

func newLeases(db *pgxpool.Pool, sql statements, cfg Config, h *hand, health *condition) *leases {
	return &leases{
		db: db, sql: sql, name: cfg.Name, lease: cfg.Lease, hand: h,
		log: cfg.Logger, health: health, changed: make(chan struct{}, 1), wake: make(chan struct{}, 1), owner: uuid.New(),
	}
}

// mayPublish says whether a message may be written to the broker now. It is asked
// right before each write: a relay that cannot renew stops before its lease ends.
func (l *leases) mayPublish(m *message, now int64) bool {
	l.mu.RLock()
	ours, ended := l.epochs[m.lane] == m.epoch, now >= l.deadline
	l.mu.RUnlock()
	if ours && ended {
		l.mu.Lock()
		l.lapse()
		l.mu.Unlock()
	}
	return ours && !ended
}

// owned returns the epochs of the lanes that are ours.
func (l *leases) owned() [lanes]int64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.epochs
}

// identity returns the owner under which the lanes are held now.
func (l *leases) identity() uuid.UUID {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.owner
}

// lapse gives up all lanes if the lease has ended, and the identity under which
// they were ours: whoever takes them now, we ourselves included, is a new owner.
// The caller holds mu.
func (l *leases) lapse() {
	if l.deadline == 0 || since() < l.deadline {
		return
	}
	l.lost.Add(1)
	l.log.Warn("relay: lease ended before it was renewed; all lanes given up")
	l.owner, l.epochs, l.draining, l.deadline = uuid.New(), [lanes]int64{}, [lanes]drain{}, 0
}

// run keeps the lease and the fair share of lanes until ctx ends. A round that is under way
// then comes to its end, before that of hard: cut short, it might still be done after all
// has been released, on a busy server or behind a pooler.
func (l *leases) run(ctx, hard context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var renewAt int64
	for {
		renew := since() >= renewAt
		useless := l.useless()
		err := l.once(hard, renew)
		if ctx.Err() != nil {
			return
		}
		if err != nil || !useless {
			l.health.set(err)
		}
		if err == nil && renew {
			renewAt = since() + int64(l.lease/3)
		}
		if err != nil {
			renewAt = 0
		}
		// A relay without lanes reads nothing that would tell it of free ones.
		next := min(round, l.lease/3)
		if l.owned() == [lanes]int64{} {
			next = min(next, takeEvery)
		}
		if pause(ctx, min(next, takeEvery)) != nil {
			return
		}
		timer.Reset(next - min(next, takeEvery))
		select {
		case <-timer.C:
		case <-l.wake:
		case <-ctx.Done():
			return
		}
	}
}

// once does one round: renew, take, give up what is beyond the fair share; or all,
// for others to take that reach the broker.
func (l *leases) once(ctx context.Context, renew bool) error {
	if l.useless() {
		return l.retire(ctx)
	}
	l.mu.Lock()
	l.lapse()
	owner, deadline := l.owner, l.deadline
	l.mu.Unlock()
	sent := since()
	timeout := l.lease / 3
	if deadline == 0 {
		renew = true
	} else {
		timeout = min(timeout, time.Duration(deadline-sent))
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	failpoint.Hit("relay/lease")
	owned, share, err := l.exchange(ctx, owner, renew)
	failpoint.Hit("relay/leased")
	if err != nil {
		return fmt.Errorf("lease lanes: %w", err)
	}
	if !l.adopt(owner, owned, sent, renew) {
		return nil
	}
	return l.giveUp(ctx, share)
}

// retire gives up all lanes and the share that others leave us. The identity goes
// with them, so that no answer that comes later counts.
func (l *leases) retire(ctx context.Context) error {
	l.mu.Lock()
	former, held := l.owner, l.deadline != 0
	l.owner, l.epochs, l.draining, l.deadline = uuid.New(), [lanes]int64{}, [lanes]drain{}, 0
	l.mu.Unlock()
	if !held {
		return nil
	}
	l.log.Warn("relay: broker away for longer than the lease; all lanes given up")
	all := make([]int16, lanes)
	for i := range all {
		all[i] = int16(i)
	}
	ctx, cancel := context.WithTimeout(ctx, l.lease/3)
	defer cancel()
	if err := l.release(ctx, former, all, true); err != nil {
		return fmt.Errorf("release lanes: %w", err)
	}
	return nil
}

func (l *leases) exchange(ctx context.Context, owner uuid.UUID, renew bool) (owned map[int16]int64, share int, err error) {
	rows, err := l.db.Query(ctx, l.sql.lease, unplanned, owner, l.name, l.lease, renew)
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
	return owned, share, nil
}

// adopt makes memory agree with what the database says is ours. It returns false
// if the lease ended while the answer was on its way: others may own all by now.
func (l *leases) adopt(owner uuid.UUID, owned map[int16]int64, sent int64, renewed bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lapse()
	if l.owner != owner {
		return false
	}
	if renewed {
		l.deadline = sent + int64(l.lease)
	}
	if none := [lanes]int64{}; l.epochs == none && len(owned) > 0 && l.draining == [lanes]drain{} {
		l.log.Info("relay: owns lanes", "lanes", len(owned))
	}
	for lane := range l.epochs {
		epoch := owned[int16(lane)]
		if epoch != 0 && l.draining[lane].epoch == epoch {
			continue
		}
		l.draining[lane] = drain{} // released, and perhaps taken again
		if l.epochs[lane] != epoch {
			l.epochs[lane] = epoch
			notify(l.changed)
		}
	}
	return true
}

// giveUp frees the lanes beyond our share. Publishing in them stops at once; a
// lane is released when nothing of it is in the hand, so that its next owner
// repeats nothing, but not later than after a lease: its other keys would wait.
func (l *leases) giveUp(ctx context.Context, share int) error {
	l.mu.Lock()
	kept, empty := 0, []int16{}
	for lane := range l.epochs {
		if l.epochs[lane] != 0 {
			if kept++; kept > share {
				l.epochs[lane], l.draining[lane] = 0, drain{l.epochs[lane], since() + int64(l.lease)}
			}
		}
		if d := l.draining[lane]; d.epoch != 0 && (l.hand.empty(lane) || since() > d.until) {
			empty = append(empty, int16(lane))
		}
	}
	l.mu.Unlock()
	if len(empty) == 0 {
		return nil
	}
	if err := l.release(ctx, l.identity(), empty, false); err != nil {
		return fmt.Errorf("release lanes: %w", err)
	}
	return nil
}

// release runs again if the session is serializable by default, and met with a renewal that
// took too long and was given up.
func (l *leases) release(ctx context.Context, owner uuid.UUID, ids []int16, leaving bool) error {
	for {
		_, err := l.db.Exec(ctx, l.sql.release, unplanned, owner, ids, leaving)
		if !hasCode(err, "40001") || pause(ctx, conflictPause) != nil {
			return err
		}
	}
}

const conflictPause = 10 * time.Millisecond

// leave frees the lanes of which nothing is under way, and says good-bye: the
// next owners start at once. The others' lease is left to run out.
func (l *leases) leave(ctx context.Context) error {
	idle := []int16{}
	for lane := range lanes {
		if l.hand.idle(lane) {
			idle = append(idle, int16(lane))
		}
	}
	if err := l.release(ctx, l.identity(), idle, len(idle) == lanes); err != nil {
		return fmt.Errorf("release lanes: %w", err)
	}
	return nil
}
