package relay

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
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
}

const (
	settleRows    = 1000
	settleDelay   = 30 * time.Millisecond // for more to settle at once
	settleTimeout = 10 * time.Second
)

// run settles until stop is closed and nothing is left, or ctx ends.
func (s *settler) run(ctx context.Context, stop <-chan struct{}) {
	for stopping := false; !stopping; {
		select {
		case <-s.hand.settle:
			if !s.hand.muchToSettle() {
				s.more(ctx, stop)
			}
		case <-stop:
			stopping = true
		case <-ctx.Done():
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
	gone, err := s.deleteFrom(ctx, s.sql.delete, fresh)
	if err == nil && gone < len(fresh) { // another owner of the lane has parked it
		parked = append(parked, fresh...)
	}
	if err == nil {
		_, err = s.deleteFrom(ctx, s.sql.deleteParked, parked)
	}
	if err != nil {
		return fmt.Errorf("delete confirmed messages: %w", err)
	}
	for _, m := range confirmed {
		s.hand.settled(m)
	}
	return nil
}

func (s *settler) deleteFrom(ctx context.Context, sql string, ms []*message) (gone int, err error) {
	if len(ms) == 0 {
		return 0, nil
	}
	ids, messageIDs := make([]int64, len(ms)), make([][16]byte, len(ms)) // pgx takes its time for uuid.UUIDs
	for i, m := range ms {
		ids[i], messageIDs[i] = m.id, m.messageID
	}
	return s.exec(ctx, sql, ids, messageIDs)
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
	if len(fresh) > 0 {
		if _, err := s.exec(ctx, s.sql.park, s.arrays(fresh)...); err != nil {
			return fmt.Errorf("park refused messages: %w", err)
		}
	}
	var died map[int64]bool
	if len(parked) > 0 {
		var err error
		if died, err = s.parkAgain(ctx, parked); err != nil {
			return fmt.Errorf("park refused messages again: %w", err)
		}
	}
	for _, v := range refused {
		if v.reason == "dead" || died[v.id] {
			s.dead(v)
		}
		s.hand.settled(v.message)
	}
	return nil
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
