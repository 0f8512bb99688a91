package relay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"
)

// locked is what cannot be settled, since somebody has locked its rows. It is written
// when that is over.
type locked struct {
	confirmed []*message
	refused   []verdict
	wait      time.Duration // between two tries
	next      time.Time     // when it is tried again
	since     time.Time     // when the first was found
	told      *condition    // of what has been locked for long
}

const (
	// It is tried again after that, the longer the longer it is locked.
	lockedFirst = time.Second
	lockedMost  = 10 * time.Second
	lockedLong  = 10 * time.Second // then it is told
	// lockWait is how long a statement waits for a row that somebody has locked, and
	// lockWaitHalf how long, when it did so in vain, its halves do.
	lockWait     = "200ms"
	lockWaitHalf = "1ms"
)

// any says that there is something.
func (l *locked) any() bool { return len(l.confirmed)+len(l.refused) > 0 }

// found notes, after a statement, when to try what it has left.
func (l *locked) found() {
	if l.any() && l.since.IsZero() {
		l.wait, l.since = lockedFirst, time.Now()
		l.next = l.since.Add(l.wait)
	}
}

// due returns a channel on which something comes when it is to be tried, nil for never.
func (l *locked) due() <-chan time.Time {
	if !l.any() {
		return nil
	}
	return time.After(time.Until(l.next))
}

// tried notes, after a try, when the next one is.
func (l *locked) tried() {
	if !l.any() {
		l.since = time.Time{}
		l.told.set(nil)
		return
	}
	l.wait = min(2*l.wait, lockedMost)
	l.next = time.Now().Add(l.wait)
	if time.Since(l.since) < lockedLong {
		return
	}
	var one uuid.UUID
	if len(l.confirmed) > 0 {
		one = l.confirmed[0].messageID
	} else {
		one = l.refused[0].messageID
	}
	l.told.set(fmt.Errorf("%d rows are locked by other sessions, one of them that of message %s", len(l.confirmed)+len(l.refused), one))
}

// settleLocked tries what was locked; it returns false if ctx ended. A refusal is given
// up when its lane has gone, since it would come to nothing: the row is left to the next
// owner.
func (s *settler) settleLocked(ctx context.Context) bool {
	confirmed, refused := s.locked.confirmed, s.locked.refused
	s.locked.confirmed, s.locked.refused = nil, nil
	owned, ours := s.leases.owned(), refused[:0]
	for _, v := range refused {
		if v.epoch == owned[v.lane] {
			ours = append(ours, v)
		} else {
			s.hand.giveUp(v)
		}
	}
	if !s.settleAll(ctx, confirmed, ours) {
		return false
	}
	s.locked.tried()
	return true
}

// byHalves writes about rows in one statement, or, while it fails since some are locked,
// in one for each half. It returns those that are.
func byHalves[T any](rows []T, write func(rows []T, wait string) error) (locked []T, err error) {
	var part func(rows []T, wait string) error
	part = func(rows []T, wait string) error {
		if len(rows) == 0 {
			return nil
		}
		err := write(rows, wait)
		switch {
		case !isLocked(err):
			return err
		case len(rows) == 1:
			locked = append(locked, rows[0])
			return nil
		}
		half := len(rows) / 2
		if err := part(rows[:half], lockWaitHalf); err != nil {
			return err
		}
		return part(rows[half:], lockWaitHalf)
	}
	return locked, part(rows, lockWait)
}

// isLocked says that a statement gave up, since somebody has locked a row.
func isLocked(err error) bool { return hasCode(err, "55P03") }

// hasCode says that PostgreSQL answered with an SQLSTATE.
func hasCode(err error, code string) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr != nil && pgErr.Code == code
}

// byKey puts the verdicts of each key together, in their order. If one of them cannot be
// written none is: a message must not be parked before another that it follows.
func byKey(all []verdict) (keys [][]verdict) {
	known := make(map[string]int)
	for _, v := range all {
		i, ok := known[v.key]
		if !ok || v.key == "" {
			i = len(keys)
			keys, known[v.key] = append(keys, nil), i
		}
		keys[i] = append(keys[i], v)
	}
	return keys
}

// holds says that a verdict for a message of a key is among what is locked.
func (l *locked) holds(key string) bool {
	return key != "" && slices.ContainsFunc(l.refused, func(v verdict) bool { return v.key == key })
}
