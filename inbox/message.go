package inbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Message is a received message. It is the same on first delivery and whenever
// it is handled again, except for Attempt.
type Message struct {
	ID          string // message_id; stable for all deliveries of the message
	Key         string // header outbox-key; "" if the message has no order to keep
	Type        string
	ContentType string
	Exchange    string // it was published to
	RoutingKey  string // it was published with

	// Headers holds all headers. Values that are not strings are rendered as text:
	// numbers and booleans as in Go, times as RFC 3339 in UTC, nothing as "".
	Headers map[string]string
	Payload []byte
	// CreatedAt is when the message was written, by header outbox-created-at, else
	// by the property timestamp; zero if neither tells.
	CreatedAt time.Time
	// Attempt is 1 more than the attempts that failed. RetryAfter is no failure.
	Attempt int
}

// Handler handles a message. What it does with tx takes effect once per message,
// if and only if it returns nil: tx also holds the record of the message, and is
// committed or rolled back after the Handler returned. Of tx it can use everything,
// such as outbox.Write, except Commit, Rollback and statements that do the same;
// one that gets round that makes the message dead, whatever was committed. See Pipeline
// for statements that need no answer.
//
// An error or a panic parks the message in the table inbox_parked, to be handled
// again later, and acknowledges it to RabbitMQ; see Reject and RetryAfter. The
// Handler may be called several times for one message, so effects outside tx need
// the message's ID as their idempotency key. Calls run side by side in up to
// Config.Workers goroutines, those with one Key one after another.
//
// ctx ends after Config.Timeout, or when the consumer stops. A Handler must then
// return; nothing in Go can stop one that does not, and its worker waits for it.
// In tx a lock is awaited for 5 s at most; in a batch for 0.2 s, after which it is handled in
// smaller ones and at last alone.
type Handler func(ctx context.Context, tx pgx.Tx, m Message) error

// JSON makes a Handler of a function that takes the payload decoded from JSON. A
// payload that does not decode into a T is a failure like any other error.
func JSON[T any](fn func(context.Context, pgx.Tx, Message, T) error) Handler {
	if fn == nil {
		return nil
	}
	return func(ctx context.Context, tx pgx.Tx, m Message) error {
		var payload T
		if err := json.Unmarshal(m.Payload, &payload); err != nil {
			return fmt.Errorf("decode payload: %w", err)
		}
		return fn(ctx, tx, m, payload)
	}
}

// Reject returns an error with which a Handler says that trying again is of no
// use: the message is parked as dead at once. err says why; nil stands for no reason.
func Reject(err error) error {
	if err == nil {
		err = errors.New("no reason given")
	}
	return &rejection{err}
}

type rejection struct{ err error }

func (r *rejection) Error() string { return "rejected: " + r.err.Error() }
func (r *rejection) Unwrap() error { return r.err }

// RetryAfter returns an error with which a Handler says that it cannot work now,
// through no fault of the message: a third party is down. The message is parked
// and handled again after d, at least a second. That spends no attempt, so there is no
// limit to it: Message.Attempt stays what it is, those of its key wait, and a Handler
// that wants an end to it looks at Message.CreatedAt. err says why; it may be nil.
func RetryAfter(d time.Duration, err error) error {
	if err == nil {
		err = errors.New("no reason given")
	}
	return &postponement{max(d, time.Second), err}
}

type postponement struct {
	delay time.Duration
	err   error
}

func (p *postponement) Error() string { return "postponed: " + p.err.Error() }
func (p *postponement) Unwrap() error { return p.err }
