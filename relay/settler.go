package relay

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/failpoint"
)

// settler makes the tables agree with the broker's answers: confirmed messages
// are deleted, refused ones parked. What it cannot write it writes later; until
// then the messages stay in the hand.
type settler struct {
	db       *pgxpool.Pool
	sql      statements
	hand     *hand
	leases   *leases
	retryFor time.Duration
	health   *condition
	dead     func(v verdict) // is told of messages that wait for a human
	locked   locked
}

const (
	settleRows    = 1000
	settleDelay   = 30 * time.Millisecond // for more to settle at once
	settleTimeout = 10 * time.Second
	maxAttempts   = 1_000_000_000
)

// run settles until stop is closed and nothing is left, or ctx ends.
func (s *settler) run(ctx context.Context, stop <-chan struct{}) {
	for stopping := false; !stopping; {
		select {
		case <-s.hand.settle:
			if !s.hand.muchToSettle() {
				s.more(ctx, stop)
			}
		case <-s.locked.due():
		case <-stop:
			stopping = true
		case <-ctx.Done():
			return
		}
		if s.locked.any() && (stopping || !time.Now().Before(s.locked.next)) && !s.settleLocked(ctx) {
			return
		}
		for more := true; more; more = stopping || s.hand.muchToSettle() {
			confirmed, refused := s.hand.toSettle(settleRows)
			if len(confirmed) == 0 && len(refused) == 0 {
				break
			}
			if !s.settleAll(ctx, confirmed, refused) {
				return
			}
		}
	}
}

// more waits for more to settle at once.
func (s *settler) more(ctx context.Context, stop <-chan struct{}) {
	select {
	case <-time.After(settleDelay):
	case <-stop:
	case <-ctx.Done():
	}
}

// settleAll writes until it succeeds; it returns false if ctx ended before.
func (s *settler) settleAll(ctx context.Context, confirmed []*message, refused []verdict) bool {
	for failures := 0; ; failures++ {
		err := s.delete(ctx, confirmed)
		if err == nil {
			confirmed = nil
			err = s.park(ctx, refused)
		}
		if ctx.Err() != nil {
			return false
		}
		s.health.set(err)
		if err == nil {
			s.locked.found()
			return true
		}
		if pause(ctx, min(backOff(failures), time.Second)) != nil {
			return false
		}
	}
}

// delete removes the rows of confirmed messages. It is not fenced: whoever owns
// the lane now, a confirmed message is done. Nothing waits for the disk: what a
// crash forgets is published twice.
func (s *settler) delete(ctx context.Context, confirmed []*message) error {
	var fresh, parked []*message
	for _, m := range confirmed {
		if m.parked {
			parked = append(parked, m)
		} else {
			fresh = append(fresh, m)
		}
	}
	failpoint.Hit("relay/confirmed")
	moved, locked, err := s.deleteFresh(ctx, fresh)
	failpoint.Hit("relay/mid-delete")
	if err != nil {
		return fmt.Errorf("delete confirmed messages: %w", err)
	}
	left, err := s.deleteParked(ctx, append(parked, moved...))
	if err != nil {
		return fmt.Errorf("delete confirmed messages: %w", err)
	}
	failpoint.Hit("relay/deleted")
	for _, m := range locked {
		left[m.id] = true
	}
	for _, m := range confirmed {
		if left[m.id] {
			s.hand.putAside(m)
			s.locked.confirmed = append(s.locked.confirmed, m)
		} else {
			s.hand.deleted(m)
		}
	}
	return nil
}

// deleteFresh deletes messages from outbox. It returns those some of which another owner
// of the lane has parked, and those that somebody has locked.
func (s *settler) deleteFresh(ctx context.Context, ms []*message) (moved, locked []*message, err error) {
	locked, err = byHalves(ms, func(ms []*message, wait string) error {
		ids, messageIDs := identities(ms)
		gone, err := s.exec(ctx, s.sql.delete, ids, messageIDs, wait)
		if err == nil && gone < len(ms) {
			moved = append(moved, ms...)
		}
		return err
	})
	return moved, locked, err
}

// deleteParked deletes messages from outbox_parked. It returns those that are left,
// since somebody has locked them.
func (s *settler) deleteParked(ctx context.Context, ms []*message) (left map[int64]bool, err error) {
	left = make(map[int64]bool)
	if len(ms) == 0 {
		return left, nil
	}
	failpoint.Hit("relay/unpark")
	ids, messageIDs := identities(ms)
	if gone, err := s.exec(ctx, s.sql.deleteParked, ids, messageIDs, lockWait); err != nil || gone == len(ms) {
		return left, err
	}
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	rows, err := s.db.Query(ctx, s.sql.leftParked, unplanned, ids, messageIDs)
	if err != nil {
		return nil, err
	}
	var id int64
	_, err = pgx.ForEachRow(rows, []any{&id}, func() error { left[id] = true; return nil })
	return left, err
}

// identities returns ids and message IDs; pgx takes its time for uuid.UUIDs.
func identities(ms []*message) (ids []int64, messageIDs [][16]byte) {
	ids, messageIDs = make([]int64, len(ms)), make([][16]byte, len(ms))
	for i, m := range ms {
		ids[i], messageIDs[i] = m.id, m.messageID
	}
	return ids, messageIDs
}

// park records refusals, of messages whose lane is still ours under the epoch at
// which they were read.
func (s *settler) park(ctx context.Context, refused []verdict) error {
	var fresh, parked, locked []verdict
	for _, v := range refused {
		switch {
		case v.parked:
			parked = append(parked, v)
		case s.locked.holds(v.key):
			locked = append(locked, v)
		default:
			fresh = append(fresh, v)
		}
	}
	lockedKeys, err := byHalves(byKey(fresh), func(keys [][]verdict, wait string) error {
		failpoint.Hit("relay/park")
		_, err := s.exec(ctx, s.sql.park, append(s.arrays(slices.Concat(keys...)), wait)...)
		return err
	})
	if err != nil {
		return fmt.Errorf("park refused messages: %w", err)
	}
	locked = append(locked, slices.Concat(lockedKeys...)...)
	failpoint.Hit("relay/parked")
	died := make(map[int64]bool)
	lockedAgain, err := byHalves(parked, func(parked []verdict, wait string) error { return s.parkAgain(ctx, parked, wait, died) })
	if err != nil {
		return fmt.Errorf("park refused messages again: %w", err)
	}
	locked = append(locked, lockedAgain...)
	s.locked.refused = append(s.locked.refused, locked...)
	for _, v := range refused {
		if slices.ContainsFunc(locked, func(l verdict) bool { return l.id == v.id }) {
			continue
		}
		if v.reason == "dead" || died[v.id] {
			s.dead(v)
		}
		s.hand.recorded(v)
	}
	return nil
}

// parkAgain notes which messages are dead now.
func (s *settler) parkAgain(ctx context.Context, refused []verdict, wait string, died map[int64]bool) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	rows, err := s.db.Query(ctx, s.sql.repark, append(append([]any{unplanned}, s.arrays(refused)...), wait, s.retryFor.Seconds())...)
	if err != nil {
		return err
	}
	var id int64
	var dead bool
	_, err = pgx.ForEachRow(rows, []any{&id, &dead}, func() error {
		died[id] = dead
		return nil
	})
	return err
}

func (s *settler) arrays(refused []verdict) []any {
	n := len(refused)
	laneIDs, epochs, ids, messageIDs := make([]int16, n), make([]int64, n), make([]int64, n), make([]uuid.UUID, n)
	reasons, attempts, delays, errs := make([]string, n), make([]int32, n), make([]float64, n), make([]string, n)
	for i, v := range refused {
		laneIDs[i], epochs[i], ids[i], messageIDs[i] = v.lane, v.epoch, v.id, v.messageID
		reasons[i], attempts[i], delays[i], errs[i] = v.reason, int32(min(v.attempts, maxAttempts)+v.spend), v.delay.Seconds(), v.lastError
	}
	return []any{s.leases.identity(), laneIDs, epochs, ids, messageIDs, reasons, attempts, delays, errs}
}

// exec runs one statement, within settleTimeout.
func (s *settler) exec(ctx context.Context, sql string, args ...any) (rows int, err error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	tag, err := s.db.Exec(ctx, sql, append([]any{unplanned}, args...)...)
	return int(tag.RowsAffected()), err
}
