package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
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

	// Those whose rows somebody has locked. They are written when that is over.
	lockedConfirmed []*message
	lockedRefused   []verdict
}

const (
	settleRows    = 1000
	settleDelay   = 30 * time.Millisecond // for more to settle at once
	settleTimeout = 10 * time.Second
	lockedEvery   = time.Second // rows that were locked are tried again
)

// run settles until stop is closed and nothing is left, or ctx ends.
func (s *settler) run(ctx context.Context, stop <-chan struct{}) {
	for stopping := false; !stopping; {
		var unlocked <-chan time.Time
		if len(s.lockedConfirmed)+len(s.lockedRefused) > 0 {
			unlocked = time.After(lockedEvery)
		}
		locked := false
		select {
		case <-s.hand.settle:
			if !s.hand.muchToSettle() {
				s.more(ctx, stop)
			}
		case <-unlocked:
			locked = true
		case <-stop:
			stopping, locked = true, true
		case <-ctx.Done():
			return
		}
		if locked {
			confirmed, refused := s.lockedConfirmed, s.lockedRefused
			s.lockedConfirmed, s.lockedRefused = nil, nil
			if !s.settleAll(ctx, confirmed, refused) {
				return
			}
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
	err := s.deleteAll(ctx, confirmed, s.sql.delete, s.sql.deleteParked)
	var left map[int64]bool
	var locked *pgconn.PgError
	if errors.As(err, &locked) && locked != nil && locked.Code == "55P03" {
		if err = s.deleteAll(ctx, confirmed, s.sql.deleteFree, s.sql.deleteParkedFree); err == nil {
			left, err = s.left(ctx, confirmed, s.sql.left, s.sql.leftParked)
		}
	}
	if err != nil {
		return fmt.Errorf("delete confirmed messages: %w", err)
	}
	for _, m := range confirmed {
		if left[m.id] {
			s.lockedConfirmed = append(s.lockedConfirmed, m)
		} else {
			s.hand.settled(m)
		}
	}
	return nil
}

func (s *settler) deleteAll(ctx context.Context, confirmed []*message, fromOutbox, fromParked string) error {
	var fresh, parked []*message
	for _, m := range confirmed {
		if m.parked {
			parked = append(parked, m)
		} else {
			fresh = append(fresh, m)
		}
	}
	gone, err := s.deleteFrom(ctx, fromOutbox, fresh)
	if err == nil && gone < len(fresh) { // another owner of the lane has parked it
		parked = append(parked, fresh...)
	}
	if err == nil {
		_, err = s.deleteFrom(ctx, fromParked, parked)
	}
	return err
}

func (s *settler) deleteFrom(ctx context.Context, sql string, ms []*message) (gone int, err error) {
	if len(ms) == 0 {
		return 0, nil
	}
	ids, messageIDs := identities(ms)
	return s.exec(ctx, sql, ids, messageIDs)
}

// left returns which of the messages are in one of the tables that are asked.
func (s *settler) left(ctx context.Context, ms []*message, tables ...string) (map[int64]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	left := make(map[int64]bool)
	ids, messageIDs := identities(ms)
	for _, sql := range tables {
		rows, err := s.db.Query(ctx, sql, unplanned, ids, messageIDs)
		if err != nil {
			return nil, err
		}
		var id int64
		if _, err := pgx.ForEachRow(rows, []any{&id}, func() error { left[id] = true; return nil }); err != nil {
			return nil, err
		}
	}
	return left, nil
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
	var fresh, parked []verdict
	for _, v := range refused {
		if v.parked {
			parked = append(parked, v)
		} else {
			fresh = append(fresh, v)
		}
	}
	left, err := s.parkFresh(ctx, fresh)
	if err != nil {
		return fmt.Errorf("park refused messages: %w", err)
	}
	var died map[int64]bool
	if len(parked) > 0 {
		if died, err = s.parkAgain(ctx, parked); err != nil {
			return fmt.Errorf("park refused messages again: %w", err)
		}
	}
	owned := s.leases.owned()
	for _, v := range refused {
		if left[v.id] && owned[v.lane] == v.epoch {
			s.lockedRefused = append(s.lockedRefused, v)
			continue
		}
		if v.reason == "dead" || died[v.id] {
			s.dead(v)
		}
		s.hand.settled(v.message)
	}
	return nil
}

// parkFresh returns which messages are still in outbox.
func (s *settler) parkFresh(ctx context.Context, fresh []verdict) (left map[int64]bool, err error) {
	if len(fresh) == 0 {
		return nil, nil
	}
	moved, err := s.exec(ctx, s.sql.park, s.arrays(fresh)...)
	if err != nil || moved == len(fresh) {
		return nil, err
	}
	ms := make([]*message, len(fresh))
	for i, v := range fresh {
		ms[i] = v.message
	}
	return s.left(ctx, ms, s.sql.left)
}

// parkAgain returns which messages are dead now.
func (s *settler) parkAgain(ctx context.Context, refused []verdict) (died map[int64]bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	rows, err := s.db.Query(ctx, s.sql.repark, append(append([]any{unplanned}, s.arrays(refused)...), s.retryFor.Seconds())...)
	if err != nil {
		return nil, err
	}
	died = make(map[int64]bool)
	var id int64
	var dead bool
	_, err = pgx.ForEachRow(rows, []any{&id, &dead}, func() error {
		died[id] = dead
		return nil
	})
	return died, err
}

func (s *settler) arrays(refused []verdict) []any {
	n := len(refused)
	laneIDs, epochs, ids, messageIDs := make([]int16, n), make([]int64, n), make([]int64, n), make([]uuid.UUID, n)
	reasons, attempts, delays, errs := make([]string, n), make([]int32, n), make([]float64, n), make([]string, n)
	for i, v := range refused {
		laneIDs[i], epochs[i], ids[i], messageIDs[i] = v.lane, v.epoch, v.id, v.messageID
		reasons[i], attempts[i], delays[i], errs[i] = v.reason, int32(v.spend), v.delay.Seconds(), v.lastError
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
